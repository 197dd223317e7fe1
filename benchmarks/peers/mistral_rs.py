"""mistral.rs through its Python package, which quantises a folder while it loads it."""

import json
import tempfile
from pathlib import Path
from typing import Any

from mistralrs import CompletionRequest, Runner, Which
from wire import serve


class MistralRs:
    """isq: how weights are quantised at loading; None: not at all."""

    def __init__(self, folder: str, isq: str | None, threads: int):
        with tempfile.TemporaryDirectory() as made:
            _as_it_was(Path(folder), Path(made))
            self.runner = Runner(Which.Plain(made), in_situ_quant=isq, prefix_cache_n=0)

    def set(self) -> None:
        pass

    def round(self, tokens: list[int], prompt: int, setting: dict[str, Any]) -> dict[str, Any]:
        """Seconds of prefill and decode, as it counts them itself: its tokens are text only."""
        text = self.runner.detokenize_text(tokens[:prompt], False)
        new = len(tokens) - prompt
        request = CompletionRequest(text, "default", max_tokens=new, ignore_eos=True, temperature=1)
        usage = self.runner.send_completion_request(request).usage
        prefill = usage.total_prompt_time_sec * prompt / usage.prompt_tokens
        decode = usage.total_completion_time_sec * new / usage.completion_tokens
        return {"prefill": prefill, "decode": decode}


def _as_it_was(folder: Path, made: Path) -> None:
    """The same model in another folder, its config.json as transformers 4 wrote it."""
    for file in folder.iterdir():
        (made / file.name).symlink_to(file.resolve())
    config = json.loads((folder / "config.json").read_text())
    (made / "config.json").unlink()
    older = {
        "max_window_layers": config["num_hidden_layers"],
        "use_sliding_window": False,
        "num_experts": config.get("num_local_experts"),
        **(config.get("rope_parameters") or {}),
        **config,
    }
    (made / "config.json").write_text(json.dumps(older))


if __name__ == "__main__":
    serve(MistralRs)
