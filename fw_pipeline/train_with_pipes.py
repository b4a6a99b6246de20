"""Entry of a training process that Dagster starts: `fw_model.train` with its metrics sent back through Pipes.

Only rank 0 of a job speaks to Dagster. Started by hand, without Dagster, it is `fw_model.train` and nothing more.
"""

import os
import sys

from fw_model.errors import explain_errors


@explain_errors
def main(argv: list[str]) -> int:
    from fw_model.train.__main__ import main as train

    if os.environ.get("RANK", "0") != "0" or "DAGSTER_PIPES_CONTEXT" not in os.environ:
        return train(argv)
    from dagster_pipes import open_dagster_pipes

    from fw_model.train.metrics_log import in_words

    with open_dagster_pipes() as pipes:

        def send(metrics: dict[str, float]) -> None:
            numbers = {key: value for key, value in metrics.items() if key != "step"}
            pipes.log.info(f"step {metrics['step']:.0f}: {in_words(numbers)}")

        return train(argv, on_metrics=send)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
