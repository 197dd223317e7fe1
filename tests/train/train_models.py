"""What tests of training share: overrides for the run of conftest.py's yaml_file, a log."""


class Log:
    """Keeps what it is told."""

    def __init__(self):
        self.lines, self.records = [], []

    def say(self, line):
        self.lines.append(line)

    def metrics(self, record):
        self.records.append(record)


def latent_overrides() -> list[str]:
    """What makes it one of a tiny DeepSeek-V3; its first layer is dense."""
    ranks = "kv_lora_rank: 16, q_lora_rank: 16"
    heads = "qk_rope_head_dim: 8, qk_nope_head_dim: 8, v_head_dim: 8"
    return [
        "model.family=deepseek_v3",
        "model.num_hidden_layers=3",
        "model.num_key_value_heads=4",
        "model.num_shared_experts=1",
        f"model.extra={{{ranks}, {heads}}}",
    ]
