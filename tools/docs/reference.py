"""`python -m cspd.tools.docs.reference`: the pages of docs/reference that follow from the code."""

from __future__ import annotations

import inspect
import re
import tempfile
from pathlib import Path
from typing import Any, cast

import click

import cspd
from cspd.engines.bundle import open_bundle
from cspd.engines.manifest import Manifest
from cspd.export.cli import main as export_main
from cspd.runtime.commands.cli import main as run_main
from cspd.runtime.commands.run import Job, Machine, generate
from cspd.runtime.config import RunConfig
from cspd.runtime.decode.stats import Statistics, Verdicts
from cspd.runtime.settings import configure, shipped_bundle
from cspd.tools.docs.parts import (
    comments,
    docstring,
    documented,
    item,
    kind,
    nested,
    paragraph,
    records,
    schema_items,
)  # fmt: skip

NOTE = "Written by `python -m cspd.tools.docs.reference` from the code; do not edit."
# What the parts of run.json are; the rest follows from the code.
RUN_PARTS = {
    "schema": "version of this format",
    "tool": "version of cspd",
    "bundle": "SHA-256 of the bundle's manifest; whether its weights are random",
    "distribution": "which output distribution the images are samples of, in words",
    "certificate": "what is guaranteed with `--relax`; null otherwise",
    "config": "every setting: RunConfig in [python.md](python.md#runconfig)",
    "images": "number of images",
    "seconds": "computation, summed over batches and workers, without opening and writing",
    "seconds_per_image": "the same per image",
    "statistics": "what was counted, see below",
    "graphs": "calls and seconds of every graph",
    "host": "versions and hardware that figures depend on",
    "layout": "files of the images, and images per shard",
    "session": "images and wall-clock seconds of the process that finished the run; its workers",
    "cuda_graphs": "captured loops by model, and why one was not captured; empty on a CPU",
    "notes": "what could be faster, or was done otherwise than asked for",
    "baseline": "the target alone, with `--baseline` only",
    "files": "SHA-256 of the lists of images and shards",
    "check": "checksum of all the rest, good for this run alone",
    "choices": "why the heads sample as they do, where measured costs chose",
}
# What explains itself elsewhere, or has names of its own in every run.
NESTED = ("config", "statistics", "graphs", "files")


def options_page(group: click.Group, name: str) -> str:
    """Every verb of a command line with its options."""
    parts = [f"# Options of `{name}`", NOTE, paragraph(group.help or "")]
    parts.append("`-h` or `--help` behind any verb shows its options.")
    for verb in sorted(group.commands):
        context = group.commands[verb].make_context(
            f"{name} {verb}",
            [],
            resilient_parsing=True,
            parent=click.Context(group, info_name=name),
        )
        command = context.command
        parts.append(f"## {name} {verb}")
        usage = " ".join(command.collect_usage_pieces(context))
        parts.append(f"```\n{name} {verb} {usage}\n```")
        parts += [paragraph(text) for text in (command.help, command.epilog) if text]
        # Without --help, which click makes once and names as the first caller has it.
        found = (parameter.get_help_record(context) for parameter in command.params)
        parts.append("\n".join(item(*record) for record in found if record))
    return page(parts)


def http_page() -> str:
    """Routes, requests and answers, from the server's own OpenAPI document."""
    from cspd.runtime.serve.app import make_app
    from cspd.runtime.serve.models import Settings
    from cspd.runtime.serve.service import Service

    settings = Settings(bundle=shipped_bundle())
    document = make_app(settings, Service(settings, cast(Any, None))).openapi()
    parts = ["# HTTP", NOTE, paragraph(
        "`GET /v1/models` gives the bounds of every number for the bundle that is served; they may "
        "be narrower than the types below. How to run the server: [serve.md](../how-to/serve.md)."
    )]  # fmt: skip
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            parts.append(f"## {method.upper()} {path}")
            parts.append(paragraph(route.get("description", "")))
            body = route.get("requestBody", {}).get("content", {})
            lines = [item("body", f"{form}: {_schema(found)}") for form, found in body.items()]
            parts.append("\n".join(lines + _answers(route)))
    for name, schema in sorted(document["components"]["schemas"].items()):
        if "properties" in schema:
            about = paragraph(schema.get("description", ""))
            parts += [f"## {name}", about, "\n".join(schema_items(schema))]
    return page(parts)


def _schema(content: dict[str, Any]) -> str:
    return kind(content["schema"]) if content.get("schema") else ""


def _answers(route: dict[str, Any]) -> list[str]:
    """A line for every status that a route answers with."""
    lines = []
    for status, answer in sorted(route["responses"].items()):
        forms = [
            f"{form} ({_schema(content)})" if _schema(content) else form
            for form, content in answer.get("content", {}).items()
        ]
        lines.append(item(status, " ".join([answer["description"].rstrip(".") + ".", *forms])))
    return lines


def python_page() -> str:
    """What `import cspd` gives, and the settings of a call."""
    parts = ["# Python", NOTE, "Examples: [how-to/python.md](../how-to/python.md).", "## load"]
    parts.append(documented("cspd.load", cspd.load))
    parts += ["## Pipeline", docstring(cspd.Pipeline), documented("pipe", cspd.Pipeline.__call__)]
    parts += [*public(cspd.Pipeline, "pipe"), "## Images", docstring(cspd.Images)]
    fields = inspect.get_annotations(cspd.Images)
    parts.append("\n".join(item(name, str(kind_)) for name, kind_ in fields.items()))
    parts += [*public(cspd.Images, "images"), "## CspdError", docstring(cspd.CspdError)]
    parts += ["## RunConfig", docstring(RunConfig)]
    parts.append("\n".join(schema_items(RunConfig.model_json_schema(), comments(RunConfig))))
    return page(parts)


def public(owner: type, name: str) -> list[str]:
    """The public methods and properties of a class."""
    parts = []
    for attribute, value in vars(owner).items():
        if attribute.startswith("_"):
            continue
        if isinstance(value, property):
            parts.append(f"`{name}.{attribute}`: {docstring(value)}")
        elif inspect.isfunction(value):
            parts.append(documented(f"{name}.{attribute}", value))
    return parts


def bundle_page() -> str:
    """The manifest, from its records."""
    about = (
        "A bundle is a folder with `manifest.json`, whose contents are this. Its identity is the "
        "SHA-256 of that file."
    )
    parts = ["# Bundle", NOTE, paragraph(about), records(Manifest, nested(Manifest))]
    return page(parts)


def run_page() -> str:
    """`run.json`, from that of the shortest run of the shipped pair with everything it may hold."""
    record = short_run()
    lines = []
    for name, value in record.items():
        lines.append(item(name, f"{named(value)}; {RUN_PARTS.get(name, '')}"))
        if isinstance(value, dict) and name not in NESTED:
            lines += [item(inner, named(v), 1) for inner, v in value.items()]
    lines += [item(n, f"may be absent; {RUN_PARTS[n]}") for n in RUN_PARTS if n not in record]
    counts = [item(name, named(value)) for name, value in record["statistics"].items()]
    parts = ["# run.json", NOTE, paragraph(
        "Written last, so that only a finished run has it. The other files of a run: "
        "[bulk.md](../how-to/bulk.md#what-is-in-the-folder)."
    ), "\n".join(lines), "## statistics", docstring(Statistics), docstring(Verdicts),
        "\n".join(counts)]  # fmt: skip
    return page(parts)


def short_run() -> dict[str, Any]:
    """The record of a run with one image in a step or two."""
    bundle = open_bundle(shipped_bundle())
    sampling = {"method": "cspd", "num_iter": 2, "head_steps": 2, "batch_size": 1}
    job = Job(Machine(threads=1), baseline=True, quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        record, _ = generate(bundle, configure(bundle, (0,), sampling), Path(folder), job)
    return record


def named(value: Any) -> str:
    """The JSON type of a value."""
    names = {
        bool: "boolean", int: "integer", float: "number", str: "string", dict: "object",
        list: "list",
    }  # fmt: skip
    return next((name for kind_, name in names.items() if isinstance(value, kind_)), "may be null")


def page(parts: list[str]) -> str:
    """The parts of a page with blank lines between them, quotes as Markdown has them."""
    text = "\n\n".join(part for part in parts if part.strip())
    return re.sub(r"[ \t]+\n", "\n", text) + "\n"


def pages() -> dict[str, str]:
    """Every generated page by its name."""
    return {
        "cspd-run.md": options_page(run_main, "cspd-run"),
        "cspd-export.md": options_page(export_main, "cspd-export"),
        "http.md": http_page(),
        "python.md": python_page(),
        "bundle.md": bundle_page(),
        "run-json.md": run_page(),
    }


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/reference"))
def main(out: Path) -> None:
    """Write the generated pages of the reference."""
    for name, text in pages().items():
        (out / name).write_text(text)
        click.echo(out / name)


if __name__ == "__main__":
    main()
