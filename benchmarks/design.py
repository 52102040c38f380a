"""What more data would do, forecast and done: the errors of this workspace's three probes with a second sample of BAO.

    OMP_NUM_THREADS=1 python benchmarks/design.py [--sets 200] [--seed 0]

A second sample of BAO is simulated at θ̂ and everything is fitted again, so many times. The forecast's errors should be those that the
refits have. θ̂ itself should scatter less, as the other data stay what they are: by √diag(C J C), with C the forecast's covariance and J
the information of the new sample.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from engine import Registry
from engine.information import forecast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    registry = Registry.open(Path(__file__).resolve().parents[1])
    fit = registry.estimate()
    told = forecast(fit, {"bao": 1})
    modality = registry.modality("bao")
    own = fit.parameters.indices(modality.parameter_names)
    at = fit.theta[own].expand(options.sets, -1)
    x = modality.simulate(at, torch.Generator().manual_seed(options.seed))
    data = {n: o.expand(options.sets, *o.shape) for n, o in registry.observed.items()}
    data["bao"] = torch.cat([data["bao"], x[:, None]], 1)
    many = registry.estimate_many(data, start=fit.theta, screen=0, polish=1, shape=False, progress=False)
    errors = many.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    C = told.after.matrix
    scatter = (C @ fit.contributions["bao"].information @ C).diagonal().sqrt()
    print(f"a second BAO sample, {options.sets} refits")
    print("parameter   error before   forecast   refitted, mean   forecast / refitted   scatter of θ̂ / forecast of it")
    for i, name in enumerate(fit.parameters.names):
        mean = float(errors[:, i].mean())
        moved = float(many.theta[:, i].std()) / float(scatter[i])
        print(
            f"{name:10s}  {fit[name].error:12.5g}   {told.sd[name]:8.5g}   {mean:14.5g}   {told.sd[name] / mean:19.4f}   "
            f"{moved:8.2f} ± {(2.0 * options.sets) ** -0.5:.2f}"
        )


if __name__ == "__main__":
    main()
