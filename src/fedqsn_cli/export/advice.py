"""What an owner should hear before a release: what is carried along and what is not, and why nobody could train it."""

from __future__ import annotations

from collections.abc import Sequence

from fedqsn_cli.artifacts.ledger import Release
from fedqsn_cli.artifacts.sanitize import public_companion, public_config
from fedqsn_cli.checkpoint.companion_limits import excess, most_tokens
from fedqsn_cli.checkpoint.companions import left_behind
from fedqsn_cli.errors import InputError
from fedqsn_cli.models.architecture import is_known_architecture, task_of
from fedqsn_cli.models.duplicates import false_tie
from fedqsn_cli.models.model import OpenModel
from fedqsn_cli.models.tokenizer_files import tokenizer_problem
from fedqsn_cli.options import ExportOptions
from fedqsn_cli.planning.roles import rules
from fedqsn_cli.progress import Progress
from fedqsn_cli.text import listed


def tell_what_stays(model: OpenModel, progress: Progress) -> None:
    """Name the files beside a model that are not carried along."""
    names = left_behind(model.source.path)
    if names:
        progress.note(f"not carried along: {listed(names, 8)}")


def tell_of_unusual_companions(model: OpenModel, progress: Progress) -> None:
    """Name files beside the weights that could carry weights: an audit fails them (FQ104)."""
    tokens = most_tokens(tensor.shape for tensor in model.plan.tensors)
    files = [(path.name, public_companion(path)) for path in model.checkpoint.companions]
    if model.checkpoint.config is not None:
        files.insert(0, ("config.json", public_config(model.checkpoint.config, None)))
    for name, data in files:
        found = excess(name, data, tokens)
        if found is not None:
            progress.note(f"{found.message}; it goes out with every proxy, and 'fedqsn audit' fails it (FQ104)")


def refuse_untrainable(model: OpenModel, allowed: bool) -> str | None:
    """Refuse a model whose proxies no client could train, as far as its files tell.

    Args:
        allowed: by an option.

    Returns:
        Why no client could train it, where that is allowed; None where nothing is known to be wrong.

    Raises:
        InputError: it is not allowed. FormatError: a file of its tokenizer is malformed.
    """
    problem = _problem(model)
    if problem is not None and not allowed:
        what = f"no client can train a proxy of this model: {problem}"
        raise InputError(what, where=model.source.path, hint="correct it, or give --allow-untrainable")
    return problem


def _problem(model: OpenModel) -> str | None:
    try:
        _, architecture = task_of(model.checkpoint.config, model.source.path)
    except InputError as error:
        return error.what
    if not is_known_architecture(architecture):
        return f"transformers has no architecture {architecture}, and code that comes with a model is never run"
    tied = false_tie(model.checkpoint, model.plan)
    if tied is not None:
        return f"{tied[1]} differs from {tied[0]}, though config.json ties the two"
    return tokenizer_problem(model.checkpoint.companions, _tokens(model))


def _tokens(model: OpenModel) -> int | None:
    """Number of tokens that the input embedding has."""
    inputs = rules().tied_inputs
    return max((t.shape[0] for t in model.plan.tensors if len(t.shape) == 2 and inputs.search(t.name)), default=None)


def tell_of_second_proxies(past: Sequence[Release], new: Sequence[Release], progress: Progress) -> None:
    """Name the clients that have another proxy of the same round already: both count as released.

    Args:
        past: earlier releases of the same job. new: those that are about to be recorded.
    """
    known = {(release.client, release.round): release.proxy_id for release in past}
    for release in new:
        other = known.get((release.client, release.round), release.proxy_id)
        if other != release.proxy_id:
            progress.note(
                f"client {release.client} has another proxy of round {release.round} already ({other[:12]}); "
                "with this one it sees what either shows"
            )


def check_settings(options: ExportOptions, past: Sequence[Release]) -> None:
    """Refuse to fall back to a default where a client's last release had another setting.

    A preset that is forgotten in the second round would else show more than the first did, without a word.

    Args:
        past: earlier releases of the same job.

    Raises:
        InputError: a setting that the last release of one of the clients had was not given.
    """
    last = {release.client: release for release in past if release.client in options.client}
    for client, release in last.items():
        for flag, asked, held, usual in (
            ("--schedule", options.schedule, release.schedule, "fresh"),
            ("--train", options.train, release.train or "visible", "visible"),
        ):
            if asked is None and held != usual:
                hint = f"repeat {flag} {held} or the job's --preset, or change it with {flag} {usual}"
                raise InputError(
                    f"was {held} in the last release for {client}, and is not given", where=flag, hint=hint
                )
