"""Where data comes from: one file a source, each a function that returns `SourceData`."""
