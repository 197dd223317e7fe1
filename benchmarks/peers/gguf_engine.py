"""What llama.cpp and ik_llama.cpp have in common: a GGUF file, run through their C functions."""

import ctypes
from typing import Any

_LENGTH = 1024  # positions of the cache


class GgufEngine:
    """A model of a GGUF file; `api` is the module of the C functions.

    n_batch and n_ubatch are 512, as by default.
    """

    def __init__(self, api: Any, folder: str, file: str, threads: int, **load: Any):
        self.api, self.threads = api, threads
        api.llama_backend_init()
        params = self.model_params(**load)
        self.model = api.llama_model_load_from_file(f"{folder}/{file}".encode(), params)
        if not self.model:
            raise RuntimeError(f"{file} cannot be loaded")
        self.context: Any = None
        self.setting: Any = None
        self.batch = api.llama_batch_init(_LENGTH, 0, 1)
        self.at = 0

    def model_params(self, **load: Any) -> Any:
        raise NotImplementedError

    def context_params(self, *asked: Any, **setting: Any) -> Any:
        raise NotImplementedError

    def clear(self) -> None:
        raise NotImplementedError

    def set(self, **setting: Any) -> None:
        """A context with a setting, empty; the model stays."""
        if setting != self.setting:
            if self.context:
                self.api.llama_free(self.context)
            self.context = self.api.llama_init_from_model(self.model, self._params(setting))
            if not self.context:
                raise RuntimeError(f"no context with {setting}")
            self.setting = setting
            self.prefill(list(range(64)))  # buffers are made at the first call
        self.clear()
        self.at = 0

    def prefill(self, ids: list[int]) -> None:
        self._decode(ids, every=False)
        self.api.llama_get_logits_ith(self.context, -1)[0]

    def step(self, token: int) -> None:
        self._decode([token], every=False)
        self.api.llama_get_logits_ith(self.context, -1)[0]  # waits for the step's end

    def best(self) -> int:
        return int(self._row(-1).argmax())

    def logits(self, ids: list[int]) -> Any:
        import numpy as np

        self._decode(ids, every=True)
        return np.stack([self._row(i).copy() for i in range(len(ids))])

    def _row(self, i: int) -> Any:
        """Logits (vocab,) of a token of the last batch, in the context's own memory."""
        import numpy as np

        vocab = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, i), (vocab,))

    def _params(self, setting: dict[str, Any]) -> Any:
        params = self.context_params(**setting)
        params.n_ctx = _LENGTH
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = self.threads
        return params

    def _decode(self, ids: list[int], *, every: bool) -> None:
        batch = self.batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, self.at + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = every or i == len(ids) - 1
        if status := self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        self.at += len(ids)


def set_all(params: ctypes.Structure, values: dict[str, Any]) -> Any:
    """Parameters with some of them set. Raises AttributeError for one that they do not have."""
    for name, value in values.items():
        getattr(params, name)
        setattr(params, name, value)
    return params
