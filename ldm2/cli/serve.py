"""The command `ldm2 serve`: the model behind HTTP, for programs and pages."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from ldm2.cli import options
from ldm2.option_kinds import names_a_lora
from ldm2.options import options_of
from ldm2.serve.limits import Limits

MISSING = "ldm2 serve needs {}: pip install 'ldm2[serve]'"


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser's."""
    command = commands.add_parser(
        "serve", help="a server: a page to make sound with, and an API", description="Serve a model over HTTP: a page "
        "(pip install 'ldm2[ui]') and an API with a queue, progress and cancelling. Its description is at /docs.",
        epilog="For example: ldm2 serve --model tiny")
    section = command.add_argument_group("the server")
    section.add_argument("--host", default="127.0.0.1", help="address to listen on; others than this machine's own "
                         "need a key (default: 127.0.0.1)")
    section.add_argument("--port", type=_port, metavar="N", help="port to listen on (default: the first free one from "
                         "8000 up)")
    section.add_argument("--api-key", metavar="KEY", help="what clients must know (default: LDM2_API_KEY of the "
                         "environment; where programs can be listed, better there than here)")
    section.add_argument("--insecure", action="store_true", help="serve other machines without a key")
    section.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help="let pages of this site use the "
                         "server, for example https://example.org; may be repeated")
    section.add_argument("--lora", action="append", default=[], type=_lora, metavar="NAME=FILE", help="a LoRA that "
                         "requests may ask for by this name; may be repeated")
    section.add_argument("--no-page", action="store_true", help="the API alone, without the page at /")
    section.add_argument("--batch", type=_count, default=0, metavar="N", help="requests of equal shape that run "
                         "together at most (default: as many as fit)")
    section = command.add_argument_group("limits")
    for name, each in options_of(Limits).items():
        options.add_option(section, Limits, name, each, "")
    options.add_model_options(command)
    command.set_defaults(run=serve, quiet=False)


def serve(args: argparse.Namespace) -> int:
    """Run the command, until it is stopped."""
    key = args.api_key or os.environ.get("LDM2_API_KEY") or None
    try:
        from ldm2.serve import page, server, starting
    except ModuleNotFoundError as error:
        raise ImportError(MISSING.format(error.name)) from None
    local = server.is_local(args.host)
    if not local and key is None and not args.insecure:
        raise ValueError(f"--host {args.host} is open to others: give --api-key KEY (or LDM2_API_KEY), or --insecure")
    limits = Limits(**options.given(args, Limits))
    with server.listening(args.host, args.port) as place:
        with starting.answering(place, args.model):
            pipe = options.load(args)
        pipe.loras.update(args.lora)
        for name, _ in args.lora:                          # one that does not fit is told now
            pipe.adapters.entry(name, 1.0)
        hosts = tuple(dict.fromkeys((*server.LOCAL, args.host))) if local else None
        with server.opened(pipe, limits, args.batch, key=key, hosts=hosts, origins=tuple(args.cors)) as app:
            if not args.no_page:
                page.mount(app, key)
            port = place.getsockname()[1]
            name = f"[{args.host}]" if ":" in args.host else args.host
            print(f"ldm2: serving {args.model} at http://{name}:{port} (docs at /docs, Ctrl-C stops)", file=sys.stderr,
                  flush=True)
            server.Server(app, limits.grace).run(sockets=[place])
    print("ldm2: stopped", file=sys.stderr)
    return 0


def _lora(text: str) -> tuple[str, Path]:
    """"rain=rain.safetensors" -> the name and the file."""
    name, _, file = text.partition("=")
    path = Path(file).expanduser()
    if not names_a_lora(name) or not re.fullmatch(r"[\w -]+", name) or not file:
        raise argparse.ArgumentTypeError(f"must be NAME=FILE, for example rain=rain.safetensors, got {text!r}")
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{file} does not exist")
    return name, path


def _port(text: str) -> int:
    """A port; 0 takes any."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 65535, got {text!r}")
    return int(text)


def _count(text: str) -> int:
    """A number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up, got {text!r}")
    return int(text)
