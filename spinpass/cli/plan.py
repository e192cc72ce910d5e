"""``spinpass plan``: what would be rotated, and what is refused."""

from __future__ import annotations

import typer

from spinpass.config import RotationConfig
from spinpass.errors import ConfigError
from spinpass.loading import check_program_options, load_model, locate
from spinpass.pipeline import plan

from .options import ALL, AsJson, Dequantize, Dtype, Model, NoCache, TrustRemoteCode, Verbose, rotation_options
from .screen import screen_of
from .tables import show_loading, show_plan


@rotation_options
def plan_command(
    ctx: typer.Context,
    model: Model,
    config: RotationConfig | None = None,
    dtype: Dtype = "float32",
    no_cache: NoCache = False,
    dequantize: Dequantize = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Show what would be rotated, in which form and at what cost, and what is refused and why.

    Nothing is written. The exit code is 1 if nothing can be rotated.

    Example: spinpass plan ./model --form online
    """
    screen = screen_of(ctx, as_json, verbose)
    if config is None:
        raise ConfigError("a plan needs a rotation; choose from " + ALL)
    given = {"dtype": dtype in ("float16", "bfloat16"), "no_cache": no_cache}
    check_program_options(locate(model), **given, dequantize=dequantize, trust_remote_code=trust_remote_code)
    with screen.steps() as steps:
        loaded = load_model(
            model,
            dtype=dtype,
            cache=not no_cache,
            dequantize=dequantize,
            trust_remote_code=trust_remote_code,
            streamed=True,
            progress=steps.begin,
        )
        steps.start("plan")
        decided = plan(loaded.program, config)
    show_loading(screen, loaded.report)
    if as_json:
        about = {
            "ok": bool(decided.spaces),
            "model": model,
            "loading": loaded.report.to_dict(),
            "seconds": steps.seconds,
        }
        screen.document(about | {"plan": decided.to_dict()})
    show_plan(screen, decided)
    if not decided.spaces:
        raise typer.Exit(1)
