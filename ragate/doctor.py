"""`ragate doctor`: what device, compiler, versions and models there are, and what `ragate eval` would run."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from ragate import catalog
from ragate.endpoint import is_url, shown
from ragate.errors import CatalogError, RagateError

if TYPE_CHECKING:
    from ragate.config import Settings


def findings(settings: Settings) -> Iterator[str]:
    """Lines of the report, most basic first."""
    import torch

    yield f"python      {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    packages = ("ragate", "torch", "transformers", "ragas")
    yield "versions    " + ", ".join(f"{name} {_version(name)}" for name in packages)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    yield f"card        {card}"
    yield f"kernels     {_kernels(settings)}"
    here = [m.name for m in catalog.models() if catalog.is_cached(m.name)]
    yield f"models      {', '.join(here) or 'none yet'} in {catalog.cache_folder()}"
    if is_url(settings.judge):
        yield f"judge       {shown(settings.judge)}"
    else:
        try:
            choice = catalog.resolve_judge(settings.judge, settings.device, pull=False)
            yield f"judge       {choice.name or choice.path}"
            if choice.note:
                yield f"            {choice.note}"
        except CatalogError as e:
            yield f"judge       {settings.judge}: {e}"
    yield f"target      {shown(settings.target)}"
    try:
        from ragate.suite import baseline_of_suite, load_suite

        suite = load_suite(settings)
        yield f"test set    {settings.testset}: {len(suite.items)} items, {len(suite.reserve)} in reserve"
        path = baseline_of_suite(settings, suite.name)
        yield f"baseline    {path}{'' if path.exists() else ': none yet; make one with `ragate baseline set`'}"
    except RagateError as e:
        yield f"test set    {e}"
    yield "settings"
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if name != "origins":
            if name in ("judge", "target"):
                value = shown(value)
            text = ",".join(value) if isinstance(value, tuple) else "not set" if value is None else value
            yield f"  {name:16} {text!s:40} {settings.origins.get(name, 'default')}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _kernels(settings: Settings) -> str:
    from ragate_engine import EngineError
    from ragate_engine.kernels import cpu
    from ragate_engine.runner import pick_device

    try:
        if pick_device(settings.device).type == "cuda":
            return "Triton"
    except EngineError as e:
        return str(e)
    return "C" if cpu.available() else "plain torch (slower): no C compiler found; install gcc or clang"
