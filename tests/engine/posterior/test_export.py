"""What other tools read, whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import HalfNormal, Normal, Uniform

from engine import Parameter, Posterior, PosteriorError, Registry
from engine.posterior.diagnostics import arviz
from modalities import Gaussian


@pytest.fixture(scope="module")
def post(tmp_path_factory: pytest.TempPathFactory) -> Posterior:
    r = Registry.create(
        tmp_path_factory.mktemp("export") / "w",
        [
            Parameter("mu", Normal(0.0, 2.0), unit="mm", label=r"\mu"),
            Parameter("s", HalfNormal(1.0)),
            Parameter("u", Uniform(-1.0, 3.0)),
        ],
    )
    r.append("a", Gaussian(parameter_names=("mu", "s", "u"), sd=1.0))
    return r.posterior({"a": [[1.0, 0.5, 0.0]]}, method="importance", draws=200, fixed={"u": 0.5}, seed=3)


def test_arviz_has_the_draws(post: Posterior) -> None:
    found = post.to_arviz()
    assert found.posterior.sizes == {"chain": 1, "draw": 200}
    np.testing.assert_array_equal(found.posterior["mu"].values[0], post.draws["mu"].numpy())
    assert found.posterior["mu"].attrs == {"units": "mm", "long_name": r"\mu"}
    summary = arviz().summary(found, kind="stats", round_to="none")
    assert summary.loc["mu", "mean"] == pytest.approx(float(post.draws["mu"].mean()))


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_files_come_back_with_draws_and_provenance(post: Posterior, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"post{suffix}"
    post.save(path)
    post.save(path)  # again, over what is there
    if suffix == ".nc":
        found = arviz().from_netcdf(str(path)).posterior
    else:
        import xarray as xr

        found = xr.open_zarr(path, consolidated=False).load()
    np.testing.assert_array_equal(found["s"].values[0], post.draws["s"].numpy())
    assert found.attrs["status"] == "converged"
    assert json.loads(found.attrs["provenance"])["digest"] == post.provenance["digest"]
    assert json.loads(found.attrs["log_marginal_likelihood"])["value"] == post.log_marginal_likelihood.value
    assert os.listdir(tmp_path) == [path.name]


def test_json_and_pandas_have_every_draw(post: Posterior, tmp_path: Path) -> None:
    post.save(tmp_path / "post.json")
    said = json.loads((tmp_path / "post.json").read_text())
    assert said["values"]["mu"] == post.draws["mu"].tolist()
    known = said["parameters"]["u"]
    assert (known["mean"], known["sd"], known["fixed"], set(known["quantiles"].values())) == (0.5, 0.0, True, {0.5})
    table = post.to_pandas()
    assert list(table.columns) == ["mu", "s", "u"]
    np.testing.assert_array_equal(table["s"].to_numpy(), post.draws["s"].numpy())


def test_getdist_has_weights_heights_names_and_ranges(post: Posterior, tmp_path: Path) -> None:
    post.to_getdist(tmp_path / "run")
    assert sorted(os.listdir(tmp_path)) == ["run.paramnames", "run.ranges", "run.txt"]
    rows = np.loadtxt(tmp_path / "run.txt")
    assert rows.shape == (200, 4)
    assert (rows[:, 0] == 1.0).all()
    np.testing.assert_array_equal(rows[:, 2], post.draws["mu"].numpy())
    mu, s = rows[:, 2], rows[:, 3]
    prior = 0.5 * (mu / 2) ** 2 + 0.5 * s**2 + np.log(2.0) + np.log(4.0) - np.log(2.0) + np.log(2 * np.pi)
    likelihood = 0.5 * ((mu - 1) ** 2 + (s - 0.5) ** 2 + 0.25) + 1.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(rows[:, 1], prior + likelihood, atol=1e-9)
    assert (tmp_path / "run.paramnames").read_text() == "mu\t\\mu\ns\ts\n"
    assert (tmp_path / "run.ranges").read_text() == "mu\tN\tN\ns\t0\tN\n"


def test_what_cannot_be_written_leaves_nothing_behind(post: Posterior, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(PosteriorError, match=r"saved as \.nc \(NetCDF\), \.zarr or \.json, got 'post.csv'"):
        post.save(tmp_path / "post.csv")
    with pytest.raises(PosteriorError, match="nothing can be written in"):
        post.save(tmp_path / "nowhere" / "post.nc")
    (tmp_path / "file").write_text("a file")
    with pytest.raises(PosteriorError, match="nothing can be written in"):
        post.to_getdist(tmp_path / "file" / "run")
    (tmp_path / "keep.json").write_text("before")

    def full(self: Path, *_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(PosteriorError, match=r"keep.json' cannot be written: No space left on device"):
        post.save(tmp_path / "keep.json")
    with pytest.raises(PosteriorError, match="cannot be written"):
        post.to_getdist(tmp_path / "run")
    assert sorted(os.listdir(tmp_path)) == ["file", "keep.json"]
    assert (tmp_path / "keep.json").read_text() == "before"


def test_a_table_has_every_parameter(post: Posterior) -> None:
    text = str(post)
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert text.startswith("converged — ")
    assert "mm" in lines["mu"]
    assert "fixed" in lines["u"]
    assert "log marginal likelihood" in text
    assert f"registry {post.provenance['digest'].removeprefix('sha256:')[:12]}" in text
    assert not torch.isnan(post.theta).any()
