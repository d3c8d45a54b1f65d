"""The seven tasks by lm-evaluation-harness alone, on the same rows: MODEL TASKS_DIR LIMIT BATCH. For evaluation.py."""

import logging
import sys
import time
from pathlib import Path

import torch

started = time.perf_counter()
logging.getLogger("lm_eval").setLevel(logging.ERROR)

from lm_eval.evaluator import simple_evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from shortstack.evaluation.harness import load_tasks  # noqa: E402
from shortstack.evaluation.task_files import TASKS, local_rows  # noqa: E402

if __name__ == "__main__":
    model, folder, limit, batch = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    rows = {task: local_rows(task, folder) for task in TASKS}  # where the rows come from is all that is ours
    tasks = [loaded.task for loaded in load_tasks(list(TASKS), rows, None)]
    lm = HFLM(pretrained=model, dtype=torch.float32, batch_size=batch, device="cpu")
    loaded = time.perf_counter()
    found = simple_evaluate(lm, tasks=tasks, limit=limit, bootstrap_iters=1000)
    scores = {task: found["results"][task][f"{form.metric},none"] for task, form in TASKS.items()}
    print({"scores": scores, "evaluating": time.perf_counter() - loaded})
