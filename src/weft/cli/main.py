"""The `weft` command: one verb a module, imported when its verb is called."""

from __future__ import annotations

import sys
from importlib import import_module

from weft.base.errors import WeftError

VERBS: dict[str, tuple[str, str]] = {
    "serve": ("weft.cli.serve", "Serve a model with an OpenAI-compatible API"),
    "finetune": ("weft.cli.finetune", "Train an adapter on a file, offline"),
    "export": ("weft.cli.export", "Merge an adapter into its base model"),
    "plan": ("weft.cli.plan", "Find a stage graph for a model on a cluster"),
    "simulate": ("weft.cli.simulate", "Run a plan or a serving trace under the virtual clock"),
    "train": ("weft.cli.train", "Train a model by a plan, on local ranks or under torchrun"),
    "compare-timeline": (
        "weft.cli.compare_timeline",
        "Set a run's measured timeline beside the simulated one",
    ),
    "compare": ("weft.cli.compare", "Compare planning methods on one model and cluster"),
    "explain": ("weft.cli.explain", "Say in words what binds a plan"),
    "profile": ("weft.cli.profile", "Measure a model's blocks or iterations on this machine"),
}
"""Verb -> (module with `main(argv) -> int | None`, one line of help)."""


def usage() -> str:
    """The text that `weft --help` prints."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(
        ["usage: weft VERB [options]", "", *lines, "", "`weft VERB --help` lists a verb's options"]
    )


def main(argv: list[str] | None = None) -> None:
    """Run one verb; a `WeftError` becomes one line on stderr and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        raise SystemExit(0 if arguments else 2)
    if arguments[0] in ("-V", "--version"):
        from weft import __version__

        print(f"weft {__version__}")
        return
    verb, *rest = arguments
    if verb not in VERBS:
        print(f"weft: unknown verb {verb!r}\n\n{usage()}", file=sys.stderr)
        raise SystemExit(2)
    try:
        raise SystemExit(import_module(VERBS[verb][0]).main(rest) or 0)
    except WeftError as error:
        print(f"weft {verb}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
