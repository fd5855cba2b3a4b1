"""What clients would have sent back: `python -m benchmarks.updates MODEL KEY LEDGER FORMAT FOLDER`.

One update for each release in the ledger: numbers a hundredth of the weights' size, on the units that the client saw.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.synthetic import bulk_digest, write_file


def write(model: str, key: str, ledger: str, form: str, folder: Path) -> None:
    """Write the update of every release, as folders named after the clients."""
    from fedqsn_cli.artifacts import ledger as ledgers
    from fedqsn_cli.artifacts.manifests import UPDATE_MANIFEST, UPDATE_TENSORS, Losses, UpdateManifest, manifest_bytes
    from fedqsn_cli.artifacts.update_folder import update_shape
    from fedqsn_cli.masks import job_key
    from fedqsn_cli.masks.job_masks import ClientMasks, ServerMasks
    from fedqsn_cli.models.model import open_model

    job = job_key.load(Path(key))
    plan = open_model(model, axis=job.axis, overrides=job.overrides).plan
    for number, release in enumerate(ledgers.read(Path(ledger))):
        target = folder / release.client
        target.mkdir(parents=True)
        masks = ClientMasks(
            ServerMasks(job), release.client, release.round, release.p2, release.schedule, release.rescale
        )
        shapes = {
            tensor.name: update_shape(
                tensor.shape, tensor.axis, tensor.view, tensor.view[0] * masks.visible_count(tensor)
            )
            for tensor in sorted(plan.tensors, key=lambda tensor: tensor.name)
        }
        path = target / UPDATE_TENSORS
        write_file(path, shapes, {"fp32": "F32", "bf16": "BF16"}[form], 2e-4, 1000 + number)
        manifest = UpdateManifest.model_validate(
            {
                "proxy_id": release.proxy_id,
                "proxy_sha256": release.proxy_sha256,
                "num_examples": 100 + number,
                "steps": 10,
                "losses": Losses(first=1.0, last=0.9, eval_before=None, eval_after=None),
                "precision": form,
                "tool": "fedqsn benchmarks",
                "files": {path.name: bulk_digest(path)},
            }
        )
        (target / UPDATE_MANIFEST).write_bytes(manifest_bytes(manifest))


if __name__ == "__main__":
    write(*sys.argv[1:5], Path(sys.argv[5]))
