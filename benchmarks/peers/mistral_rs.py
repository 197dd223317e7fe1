"""mistral.rs through its Python package, which quantises a folder while it loads it."""

from typing import Any

from mistralrs import CompletionRequest, Runner, Which
from wire import serve


class MistralRs:
    """isq: how weights are quantised at loading; None: not at all."""

    def __init__(self, folder: str, isq: str | None, threads: int):
        self.runner = Runner(Which.Plain(folder), in_situ_quant=isq, prefix_cache_n=0)

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


if __name__ == "__main__":
    serve(MistralRs)
