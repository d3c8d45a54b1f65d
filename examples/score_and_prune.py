"""Score, plan, prune and evaluate from Python. Run: python examples/score_and_prune.py [MODEL] [OUT]

MODEL is a checkpoint directory, a hub id, or `embedded` (the small model in the package).
"""

import sys

import shortstack


def main(model: str, out: str) -> None:
    scores = shortstack.score(model, criterion="ppl,taylor", samples=10, seq_len=128)
    print(scores.to_text())

    plan = shortstack.plan(model, scores=scores, criterion="ppl", remove=3)
    print(f"removing blocks {plan.removed}: {plan.removal_ratio:.1%} of the parameters")

    pruned = shortstack.prune(model, out=out, plan=plan, verify=True)
    print(pruned.verified)

    for result in shortstack.evaluate(model, str(pruned.out), seq_len="128").results:
        figure = result.figures["ppl_128"]
        print(f"{result.model}: {result.parameters} parameters, ppl {figure.value:.2f} ± {figure.stderr:.2f}")


if __name__ == "__main__":
    main(*(sys.argv[1:] + ["embedded", "pruned"][len(sys.argv) - 1 :]))
