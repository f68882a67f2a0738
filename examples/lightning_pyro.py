"""The variational autoencoder of `distributed_pyro.py`, trained by PyTorch Lightning.

    python examples/lightning_pyro.py --guide IAF --num-particles 5 --gradient dreg

Lightning takes the accelerator that there is, and all of its devices with `--num-devices auto`;
`--num-devices 2` on a CPU starts two processes. `--batch-size` counts the rows of one device.
"""

import time

import data
import lightning
import pyro
import report
import torch
from distributed_pyro import build, write
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from pyro_vae_ext.diagnostics import active_units, log_evidence
from pyro_vae_ext.elbos import ImportanceWeightedELBO


class VAE(lightning.LightningModule):
    """A (model, guide) pair and its bound, in nats per row."""

    def __init__(self, model, guide, elbo, *, num_steps, dynamic, seed):
        super().__init__()
        self.bound = elbo(model, guide)
        self.num_rows, self.num_steps = model.num_rows, num_steps
        self.dynamic, self.seed = dynamic, seed

    def on_fit_start(self):
        # Lightning gives all processes one seed: they would draw the same noise.
        pyro.set_rng_seed(1000 * self.seed + self.global_rank)

    def training_step(self, batch):
        (x,) = batch
        x = torch.bernoulli(x) if self.dynamic else x
        loss = self.bound(x) / self.num_rows
        self.log("bound", -loss, prog_bar=True)
        return loss

    def validation_step(self, batch):
        (x,) = batch
        bound = -self.bound(x) / self.num_rows
        # Weighted by the rows of a batch, and averaged over the processes.
        options = {"batch_size": len(x), "sync_dist": True, "prog_bar": True}
        self.log("validation_bound", bound, **options)

    def configure_optimizers(self):
        adam = torch.optim.Adam(self.parameters(), lr=2e-3)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.num_steps, eta_min=2e-5)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


def loaders(args, images):
    """Batches of the training and of the validation rows, a tenth of the data."""
    rows = torch.from_numpy(images.train).float()
    num_train = len(rows) - len(rows) // 10
    train, valid = rows[:num_train], rows[num_train:]
    if images.dynamic:
        valid = torch.bernoulli(valid)
    return (
        DataLoader(TensorDataset(train), batch_size=args.batch_size, shuffle=True),
        DataLoader(TensorDataset(valid), batch_size=args.batch_size),
    )


def main(args):
    """Train, evaluate, write the files; return the row of results on the first process."""
    if args.smoke_test:
        args.max_epochs, args.num_evaluation_samples = 3, 20
    images = data.images(args)
    start = time.perf_counter()
    lightning.seed_everything(args.seed)
    pyro.enable_validation(False)
    train_batches, valid_batches = loaders(args, images)
    model, guide = build(args, images, num_rows=len(train_batches.dataset))
    checkpoint = ModelCheckpoint(
        dirpath=args.output_dir,
        filename=f"lightning_{report.vae_stem('pyro', args).name}",
        monitor="validation_bound",
        mode="max",
        enable_version_counter=False,
    )
    trainer = lightning.Trainer(
        accelerator="auto",
        devices=args.num_devices,
        max_epochs=args.max_epochs,
        check_val_every_n_epoch=min(5, args.max_epochs),
        callbacks=[checkpoint],
        default_root_dir=args.output_dir,
        logger=False,
        enable_model_summary=False,
    )
    num_batches = -(-len(train_batches) // trainer.world_size)
    vae = VAE(
        model,
        guide,
        ImportanceWeightedELBO(args.num_particles, gradient=args.gradient),
        num_steps=args.max_epochs * num_batches,
        dynamic=images.dynamic,
        seed=args.seed,
    )
    trainer.fit(vae, train_batches, valid_batches)
    trainer.validate(vae, valid_batches, ckpt_path="best")
    if not trainer.is_global_zero:
        return None
    seconds = time.perf_counter() - start

    # The first process evaluates: Lightning leaves the parameters on the CPU.
    model, guide = vae.bound.model.cpu(), vae.bound.guide.cpu()
    x = torch.from_numpy(images.test)
    bound, log_px = (
        torch.cat([log_evidence(model, guide, part, num_samples=k) for part in x.split(1000)])
        for k in (args.num_particles, args.num_evaluation_samples)
    )
    row = {
        "backend": "Pyro",
        "data": args.dataset,
        "guide": args.guide,
        "objective": report.objective_name(args.num_particles, args.gradient),
        "bound": bound.mean().item(),
        "NLL": -log_px.mean().item(),
        "active units": int(active_units(model, guide, x[:1000]).count),
        "seconds": seconds,
        "processes": trainer.world_size,
    }
    write(args, images, model, guide, row, "lightning")
    return row


def parse_args():
    """Options; `--batch-size` and `--max-epochs` hold for both data sets here."""
    parser = report.vae_parser(__doc__)
    devices = {"type": lambda text: text if text == "auto" else int(text), "default": 1}
    parser.add_argument("--num-devices", **devices, help="or auto, for all there are")
    parser.set_defaults(max_epochs=700, batch_size=50)
    return parser.parse_args()


if __name__ == "__main__":
    row = main(parse_args())
    if row is not None:
        print(report.table([row]))
