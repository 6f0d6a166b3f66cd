"""A source of logs → prepared data. Called, it is `flm_torchrec.api.data.prepare`."""

from flm_torchrec.callable_module import make_callable

make_callable(__name__, "flm_torchrec.api.data")
