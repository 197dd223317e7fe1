"""Real instruction text as conversations: the 175 tasks that people wrote for Self-Instruct.

The file is seed_tasks.jsonl of https://github.com/tatsu-lab/stanford_alpaca (Apache 2.0). Example:

    curl -LO https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/seed_tasks.jsonl
    python benchmarks/seed_tasks.py seed_tasks.jsonl tasks.jsonl
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path


def conversations(task: dict) -> Iterator[dict]:
    """One for each instance of a task."""
    for instance in task["instances"]:
        asked = "\n\n".join(filter(None, (task["instruction"], instance["input"])))
        said = (("user", asked), ("assistant", instance["output"]))
        yield {"messages": [{"role": role, "content": content} for role, content in said]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tasks", type=Path)
    parser.add_argument("output", type=Path)
    asked = parser.parse_args()
    tasks = map(json.loads, asked.tasks.read_text(encoding="utf-8").splitlines())
    lines = [json.dumps(each) for task in tasks for each in conversations(task)]
    asked.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} conversations in {asked.output}")


if __name__ == "__main__":
    main()
