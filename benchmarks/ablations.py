"""What each choice of the recipe is worth: one thing changed at a time, measured as `benchmarks/quality.py` does.

    PYTHONPATH=src:kernels/antkv/torch-ext python benchmarks/ablations.py --out FOLDER --model MODEL \\
        --text wikitext2=wiki.test.raw --calibrate wiki.txt=0.5 code/=0.5 --work-dir WORK [--parts scores window]
    PYTHONPATH=src:kernels/antkv/torch-ext python benchmarks/ablations.py --out FOLDER --work-dir WORK --tiny
    python benchmarks/ablations.py --write docs/ablations.md

Appends to FOLDER/ablations.csv as rows finish and leaves out what is there already; --shard and several processes work
as there. Then draws FOLDER/ablations-<part>.png. --write measures nothing: it fills the page's tables, between
``<!-- table:PART -->`` and ``<!-- end -->``, from the CSV of --out (benchmarks/results by default).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from results import read_csv
from rivals.ablation_page import fill_page, plot_parts
from rivals.measuring import Table
from rivals.setup import Bench, add_arguments, named
from rivals.variants import Ablations

from antkv_hf import AnTKVCodebook

RESULTS = Path(__file__).parent / "results"
PARTS = (
    "kmeans", "bias", "scores", "window", "calibration-size", "calibration-domain", "anchor-dtype", "rope",
    "query-stride",
)  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    bench = Bench(arguments)
    table = Table(arguments.out / "ablations.csv", bench.model, bench.name)
    book = None if arguments.codebook is None else AnTKVCodebook.from_pretrained(arguments.codebook)
    variants = Ablations(bench, book, dict(map(named, arguments.domain)), arguments.domain_tokens).all()
    for variant in bench.mine([v for v in variants if v.part in arguments.parts]):
        statistics = "" if variant.learned_from is None else variant.learned_from().key
        for text in bench.texts:
            for protocol in variant.protocols:
                what = dict(part=variant.part, group=variant.group, x=variant.x, statistics=statistics)
                table.row(what, protocol, text, variant.subject)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--codebook", help="a 1-bit codebook for the parts that need no tables of their own")
    parser.add_argument(
        "--domain", action="append", default=[], metavar="NAME=PATH", help="a calibration text by itself; repeat"
    )
    parser.add_argument("--domain-tokens", type=int, default=131072, help="tokens of each domain, and of the mix")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="fill the tables of a page, and measure nothing")
    arguments = parser.parse_args()
    try:
        if arguments.write is not None:
            rows = read_csv((arguments.out or RESULTS) / "ablations.csv")
            if not rows:
                raise ValueError(f"{(arguments.out or RESULTS) / 'ablations.csv'} holds no rows: measure first")
            fill_page(arguments.write, rows, arguments.out or RESULTS)
            print(f"wrote {arguments.write}")
            return
        run(arguments)
        for path in plot_parts(read_csv(arguments.out / "ablations.csv"), arguments.out):
            print(f"wrote {path}")
    except (ValueError, OSError) as error:
        sys.exit(f"ablations.py: {error}")


if __name__ == "__main__":
    main()
