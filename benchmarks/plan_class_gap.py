"""How often and by how much the planner's class loses to all convex stage graphs (random graphs).

    python benchmarks/plan_class_gap.py [--num-graphs 300] [--max-ops 8] [--json]

Both sides are found by enumeration, so the figures are exact for these graphs; they are priced by a
toy cost model, hence about the class of plans and not about any hardware. Graphs are tiny: stages
across branches pay where few operators must be balanced over few devices.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

# The generator is the tests' own. Its package is called like the script beside this one, so the
# folder itself is put on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "plan"))

from graphs import RandomChooser, ToyCost, build_case

from weft.plan.brute_force import best_bottleneck


def gaps(num_graphs: int, max_ops: int) -> list[float]:
    """Bottleneck of the class over that of all convex stage graphs, per feasible graph."""
    found: list[float] = []
    for seed in range(num_graphs):
        case = build_case(RandomChooser(random.Random(seed)), max_ops=max_ops)
        results = [
            best_bottleneck(
                case.graph,
                case.cluster,
                ToyCost(),
                training=case.training,
                batch_size=case.batch_size,
                micro_batches=case.micro_batches,
                recompute_choices=case.recompute_choices,
                any_convex=any_convex,
            ).bottleneck_s
            for any_convex in (False, True)
        ]
        if results[1] < float("inf"):
            found.append(results[0] / results[1])
    return found


def main() -> None:
    """Print the share of graphs that lose and the distribution of the loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-graphs", type=int, default=300)
    parser.add_argument("--max-ops", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    ratios = gaps(arguments.num_graphs, arguments.max_ops)
    worse = sorted(ratio for ratio in ratios if 1 + 1e-12 < ratio < float("inf"))
    row = {
        "claim": "class against all convex stage graphs (bottleneck, simulated prices)",
        "num_graphs": len(ratios),
        "num_worse": len(worse),
        "num_infeasible_in_class": sum(ratio == float("inf") for ratio in ratios),
        "median_loss_where_worse": worse[len(worse) // 2] - 1 if worse else 0.0,
        "largest_loss": worse[-1] - 1 if worse else 0.0,
        "mean_loss": sum(r for r in ratios if r < float("inf")) / max(len(ratios), 1) - 1,
    }
    if arguments.json:
        print(json.dumps({"rows": [row]}))
        return
    print("\n".join(f"{key}: {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
