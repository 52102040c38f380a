"""Write the plugins of tests/stored anew: python tests/stored/make.py. Only for a new format: old files stay."""

import io
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.distributions import Uniform

from engine import Parameter, ParameterSpace
from engine.certificate import calibrate
from engine.learning import fit
from engine.plugin import write_plugin
from modalities import NeuralLikelihood, NeuralRatio

HERE = Path(__file__).parent
SPACE = ParameterSpace([Parameter(n, prior=Uniform(-1.0, 1.0)) for n in ("a", "b")])


def simulate(theta, generator=None):
    return theta + 0.5 * torch.randn(theta.shape, generator=generator, dtype=theta.dtype)


def main():
    ratio = NeuralRatio(("a", "b"), (2,), hidden=(6, 6))
    likelihood = NeuralLikelihood(("a", "b"), (2,), hidden=(4,), components=2)
    for name, modality in (("neural_ratio", ratio), ("neural_likelihood", likelihood)):
        fit(modality, prior=SPACE, simulate=simulate, simulations=4000, epochs=60, seed=1, progress=False)
        if name == "neural_ratio":
            modality = calibrate(modality, prior=SPACE, simulate=simulate, simulations=5000, seed=2, progress=False)
        with TemporaryDirectory() as folder:
            write_plugin(Path(folder, name), modality)
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
                for path in sorted(p for p in Path(folder, name).rglob("*") if p.is_file()):
                    archive.writestr(str(path.relative_to(folder)), path.read_bytes())
            (HERE / f"{name}_0.1.zip").write_bytes(buffer.getvalue())
        x, theta = torch.tensor([[0.3, -0.2]], dtype=torch.float64), torch.tensor([[0.1, 0.4]], dtype=torch.float64)
        print(name, repr(modality(x, theta).item()))


if __name__ == "__main__":
    main()
