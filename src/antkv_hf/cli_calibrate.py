"""``antkv calibrate``: a codebook from text, by k-means, by measured losses, by fine-tuning."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_common import (
    Device,
    DType,
    Model,
    Settings,
    _bytes_of,
    _changed,
    _check_from,
    _check_output,
    _load_model,
    _mixed_runs,
    _quiet,
    _say,
)


def calibrate(
    model: Model,
    texts: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT...",
            help="Files, folders or Hub data sets (owner/name:config:split:column); =share sets weights.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; with several --bits, its parent.")],
    bits: Annotated[
        list[str] | None, typer.Option(help="Bits per element: 4, 2, 1.25, 1, 0.75, 0.5, 0.375. Repeat it for several.")
    ] = None,
    key_bits: Annotated[str | None, typer.Option(help="Other bits (or a spec such as d16b8s2) for keys.")] = None,
    value_bits: Annotated[str | None, typer.Option(help="Other bits (or a spec) for values.")] = None,
    layer_bits: Annotated[
        str | None, typer.Option(help="Bits (or specs, or keys/values) of single layers: 0-9=0.5,10-24=2,25=1/2.")
    ] = None,
    mixed: Annotated[
        list[float] | None,
        typer.Option(help="Spread so many bits on average over layers, keys and values by measured loss; repeat."),
    ] = None,
    candidate: Annotated[
        list[str] | None, typer.Option(help="Rate or spec that --mixed may give; repeat. Default: 0.5, 1, 2, 4.")
    ] = None,
    sensitivity: Annotated[
        list[str] | None,
        typer.Option(help="Protocol by which --mixed measures: S128 (default) or W0; repeat it to serve both."),
    ] = None,
    sensitivity_windows: Annotated[
        int | None, typer.Option(help="Windows of text on which --mixed measures. Default: 4.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of text to learn from. Default: 262144.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens that the model sees at a time. Default: 2048.")] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Tokens, of those, whose keys and values the tables are fitted to. Default: 131072."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides which text and tokens are taken.")] = 0,
    work_dir: Annotated[
        Path | None, typer.Option(help="Keeps statistics: a stopped run goes on, other bits reuse them.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the model, for the card.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the codebook, for the card, e.g. apache-2.0.")] = None,
    finetune: Annotated[
        int, typer.Option(metavar="STEPS", min=0, help="Then train the tables by distillation, e.g. 150; 0: not.")
    ] = 0,
    finetune_window: Annotated[
        int | None, typer.Option(help="Tokens of a window of text that fine-tuning sees. Default: 1024.")
    ] = None,
    finetune_batch: Annotated[
        int | None, typer.Option(min=1, help="Windows of text in a step of fine-tuning. Default: 8.")
    ] = None,
    finetune_windowed: Annotated[
        float | None,
        typer.Option(help="Share of its steps in which the recent window is exact, as in use. Default: 0.75."),
    ] = None,
    finetune_rate: Annotated[float | None, typer.Option(help="Its learning rate at first. Default: 0.005.")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Windows of a step that run together; fewer take less memory. Default: 8.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="CODEBOOK",
            help="Learn none: --finetune this one (folder, Hub id, shipped name), or measure its noise anew.",
        ),
    ] = None,
    max_table_mb: Annotated[
        float | None,
        typer.Option(
            help="The most that tables may take as stored (in memory three times that, some six with kernels' tables). "
            "With --mixed: a limit of the spread. With --from, if it is not fine-tuned: the residual stages that "
            "matter least are left out."
        ),
    ] = None,
    settings: Settings = None,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Learn the codebook of a model from text. Mix the kinds of text that you will use it for.

    Example: antkv calibrate smollm2 wiki.txt=0.5 code/=0.5 --bits 1 -o codebooks/smollm2-1bit

    --mixed 1 instead of --bits 1 measures what each layer loses at each rate, and spends the bits where they count.

    Fine-tuning runs on one GPU; with --work-dir a stopped run goes on. An existing codebook:
    antkv calibrate smollm2 wiki.txt code/ --from smollm2-135m-instruct-1bit --finetune 150 -o tuned

    The same without --finetune measures what its codes lose, as older codebooks need it: 8 windows are read.

    Several GPUs share the work, each with the whole model; the tables are those of one:
    torchrun --nproc-per-node 4 -m antkv_hf.cli calibrate ... (or accelerate launch -m antkv_hf.cli calibrate ...)
    """
    _quiet()
    from .calibration import calibrate as learn
    from .calibration import measure_noise
    from .calibration.drop_stages import drop_stages
    from .calibration.finetune import Numbers
    from .calibration.finetune import finetune as tune
    from .calibration.processes import Processes, device_of, on_cpu
    from .calibration.sensitivity import Mixed
    from .codebook import AnTKVCodebook
    from .config import AnTKVConfig
    from .demo_model import REPO, WORD
    from .evaluation import save_codebook
    from .texts import TextMix

    given, limit = None, _bytes_of("--max-table-mb", max_table_mb)
    tuning = _tuning(
        finetune, finetune_window=finetune_window, finetune_batch=finetune_batch, finetune_windowed=finetune_windowed,
        micro_batch=micro_batch, finetune_rate=finetune_rate,
    )  # fmt: skip
    if start is not None:
        _check_from(
            bits=bits, mixed=mixed, key_bits=key_bits, value_bits=value_bits, layer_bits=layer_bits,
            set=settings, candidate=candidate, sensitivity=sensitivity, sensitivity_windows=sensitivity_windows,
            window=window if finetune else None, samples=samples, base_model=base_model, license=license,
            tokens=None if finetune else tokens, work_dir=None if finetune else work_dir,
        )  # fmt: skip
        given = AnTKVCodebook.from_pretrained(start)
        if limit is not None:
            given = drop_stages(given, limit)
    elif limit is not None and (bits or not mixed):
        raise ValueError(
            "--max-table-mb is a limit of --mixed (not of --bits), or makes an existing codebook smaller: name it with "
            "--from"
        )
    tokens = 262144 if tokens is None else tokens
    wanted = bits or ([] if mixed else ["1"])
    configs = [_changed(AnTKVConfig.preset(b, key=key_bits, value=value_bits), settings, layer_bits) for b in wanted]
    runs: list[tuple[str, AnTKVConfig, Mixed | None]] = [
        (f"{b.removesuffix('bit')}bit", config, None) for b, config in zip(wanted, configs, strict=True)
    ]
    runs += _mixed_runs(mixed, candidate, sensitivity, sensitivity_windows, settings, limit)
    if mixed and (key_bits or value_bits or layer_bits) and not bits:
        raise ValueError(
            "--mixed chooses the bits of keys, values and layers: leave --key-bits, --value-bits and "
            "--layer-bits out, or name --bits for another codebook"
        )
    for _, config, _ in runs if finetune else ():  # before k-means, which takes minutes
        Numbers(tokens=tokens, **tuning).check_text(given.config if given else config, "--finetune-window")
    _check_output(output, [name for name, *_ in runs] if len(runs) > 1 else [])
    mix, window = TextMix.from_sources(texts), 2048 if window is None else window
    scratch = tempfile.TemporaryDirectory(prefix="antkv-calibration-") if work_dir is None else nullcontext(work_dir)
    with scratch as place, Processes(on_cpu(device)) as processes:
        loaded, tokenizer = _load_model(model, device_of(device, processes.local_rank), dtype)
        for name, config, spread in runs:
            folder = output if len(runs) == 1 else output / name
            codebook = given or learn(
                loaded, tokenizer, mix, config, tokens=tokens, window=window, seed=seed,
                samples=131072 if samples is None else samples,
                work_dir=place, base_model=base_model or (REPO if model == WORD else None),
                license=license, mixed=spread,
            )  # fmt: skip
            if processes.rank:
                continue
            if given is not None and (limit is not None or not finetune):
                codebook = measure_noise(loaded, tokenizer, mix, given, window=window, seed=seed)
            if finetune:
                codebook = tune(loaded, tokenizer, mix, codebook, tokens=tokens, seed=seed, work_dir=work_dir, **tuning)
            save_codebook(codebook, folder)
            typer.echo(f"wrote {folder} ({codebook.tables_bytes() / 1e6:.1f} MB of tables)")
            _say(f"next: antkv evaluate {model} {folder} --text FILE --save")


def _tuning(steps: int, **options: float | None) -> dict[str, Any]:
    """Arguments of `finetune` by the options that were given; raises ValueError for those of steps not taken."""
    given = {name: number for name, number in options.items() if number is not None}
    if given and not steps:
        option = next(iter(given)).replace("_", "-")
        raise ValueError(f"--{option} is of fine-tuning: give --finetune STEPS, e.g. 150")
    arguments = {"finetune_rate": "learning_rate"}
    return {"steps": steps} | {arguments.get(name, name.removeprefix("finetune_")): x for name, x in given.items()}
