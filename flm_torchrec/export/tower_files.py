"""Names of the files of the packaged tower."""

FOLDER = "tower"
USER, ITEM, PROFILE = "user.pt2", "item.pt2", "profile.pt2"
DESCRIPTION, HISTORIES = "tower.json", "histories.parquet"
