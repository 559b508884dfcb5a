"""Perplexity of every method on the same footing: same text, same protocols, everything stored counted as bits.

    PYTHONPATH=src:kernels/antkv/torch-ext python benchmarks/quality.py --out FOLDER --model MODEL \\
        --text wikitext2=wiki.test.raw --calibrate wiki.txt=0.5 code/=0.5 --work-dir WORK [--codebooks PATH ...]
    PYTHONPATH=src:kernels/antkv/torch-ext python benchmarks/quality.py --out FOLDER --work-dir WORK --tiny

Appends to FOLDER/quality.csv as rows finish and leaves out what is there already, so several processes can share the
work (--shard 0/4, 1/4, ...) and a stopped run goes on. Then writes FOLDER/quality.md and, where matplotlib is
installed, FOLDER/quality-<protocol>.png. `benchmarks/README.md` says what the methods are; --list names them.
"""

from __future__ import annotations

import argparse
import sys
from fnmatch import fnmatch
from functools import cache, partial
from itertools import product

from results import check_names, read_csv
from rivals.measuring import Table
from rivals.methods import Method, Setting, all_methods, given_codebook
from rivals.report import plot_quality, quality_markdown
from rivals.setup import Bench, add_arguments

TINY_METHODS = ("fp8", "kivi-*", "turboquant-*", "kvquant-*", "cq-*1bit", "antkv-paper-1bit", "ours-1bit")


def chosen(patterns: list[str], codebooks: list[str]) -> list[Method]:
    """The codebooks, then methods that fit a pattern, in their order.

    Raises:
        ValueError: no method fits a pattern, or two of those chosen have one name.
    """
    known, found = all_methods(), {}
    for pattern in patterns:
        fitting = {name: method for name, method in known.items() if fnmatch(name, pattern)}
        if not fitting:
            raise ValueError(f"--methods {pattern}: no method is called so; there are {', '.join(known)}")
        found = {**found, **fitting}
    methods = [*map(given_codebook, codebooks), *found.values()]
    check_names("--codebooks", [method.name for method in methods])
    return methods


def fits(method: Method, bench: Bench) -> bool:
    """Whether the model's heads and the samples suffice for the method's tables; says so if not."""
    samples = min(bench.sizes.samples, bench.sizes.tokens)
    text = bench.model.config.get_text_config(decoder=True)
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    for spec in method.specs:
        if dim % spec.sub_dim:
            print(f"{method.name}: left out, {dim} channels of a head are no multiple of {spec.sub_dim}", flush=True)
            return False
        if method.learns and samples < spec.centroids:
            print(f"{method.name}: left out, {samples} samples are fewer than {spec.centroids} centroids", flush=True)
            return False
    return True


def run(arguments: argparse.Namespace) -> list[str]:
    """Measures what is not there yet; returns the methods that failed, after which the others went on."""
    failed = []
    bench = Bench(arguments)
    table = Table(arguments.out / "quality.csv", bench.model, bench.name)
    for method in bench.mine(chosen(arguments.methods, arguments.codebooks)):
        protocols = [protocol for protocol in method.protocols if protocol in arguments.protocols]
        if not protocols:
            print(f"{method.name}: left out, it is measured by {', '.join(method.protocols)} only", flush=True)
        if not protocols or not fits(method, bench):
            continue
        try:
            statistics = bench.statistics().key if method.learns else method.tables
            for seed in arguments.seed if method.random else [0]:
                subject = cache(partial(method.build, Setting(bench.model, bench.statistics, seed)))
                for text, protocol in product(bench.texts, protocols):
                    what = dict(method=method.name, family=method.family, seed=seed, statistics=statistics)
                    table.row(what, protocol, text, subject)
        except ImportError as error:  # an optional package is missing
            print(f"{method.name}: left out, {error}", flush=True)
        except (ValueError, OSError, RuntimeError) as error:  # what others measure must not be lost
            print(f"{method.name}: failed, {error}", flush=True)
            failed.append(method.name)
    return failed


def report(arguments: argparse.Namespace) -> None:
    if arguments.out is None:
        raise ValueError("--out FOLDER is missing")
    rows = read_csv(arguments.out / "quality.csv")
    text = quality_markdown(rows)
    (arguments.out / "quality.md").write_text(text, encoding="utf-8")
    print(text)
    for path in plot_quality(rows, arguments.out):
        print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument(
        "--methods",
        nargs="*",
        default=["*"],
        metavar="PATTERN",
        help='e.g. "kivi-*"; first things first; all by default',
    )
    parser.add_argument("--codebooks", nargs="*", default=[], metavar="[NAME=]PATH", help="ours, measured first")
    parser.add_argument("--protocols", nargs="+", default=["W0", "S128", "cache"], choices=("W0", "S128", "cache"))
    parser.add_argument(
        "--seed", type=int, nargs="+", default=[0], help="of k-means and rotations; several may be given"
    )
    parser.add_argument("--report", action="store_true", help="measure nothing, only write the table and the plots")
    parser.add_argument("--list", action="store_true", help="name the methods and stop")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{name:<24}{method.family}" for name, method in all_methods().items()))
        return
    if arguments.tiny and arguments.methods == ["*"]:
        arguments.methods = list(TINY_METHODS)
    try:
        failed = [] if arguments.report else run(arguments)
        report(arguments)
        if failed:
            raise ValueError(f"failed: {', '.join(failed)}")
    except (ValueError, OSError) as error:
        sys.exit(f"quality.py: {error}")


if __name__ == "__main__":
    main()
