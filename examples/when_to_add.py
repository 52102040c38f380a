"""When may scalars be added? From a sum that is wrong, and says so, to one that is right.

    OMP_NUM_THREADS=1 python examples/when_to_add.py [--quick] [--figure examples/when_to_add.png]

A track and a shower measure the same energy, with errors of 1 and 2, but one disturbance shakes both: their noise correlates by 0.8.
Added as if they were independent, they claim an error of 0.89 of the track's own, while the true one is larger than if the shower
had been thrown away. The test of dependence says so, and Godambe's error is honest at once; an interaction, learned from simulated
pairs and appended like any other plugin, makes the sum right, and better than either.

Then two witnesses of whom neither alone knows anything: the answer is whether they agree. Their sum is a coin, the interaction knows.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Categorical, Uniform

from engine import Estimate, Modality, Parameter, ParameterSpace, Registry
from modalities import Gaussian, Interaction, fit_interaction

TRUTH, PAIRS, RHO = 0.3, 100, 0.8
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"  # Okabe and Ito (2008)


def pairs(theta: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Both detectors at energies (n, 1): one disturbance shakes both."""
    e = torch.randn(len(theta), 2, generator=generator, dtype=torch.float64)
    return {"track": theta + e[:, :1], "shower": theta + 2.0 * (RHO * e[:, :1] + math.sqrt(1.0 - RHO**2) * e[:, 1:])}


def detectors(folder: Path, quick: bool) -> tuple[Registry, dict[str, Estimate], dict[str, Tensor]]:
    """The story of one data set: a registry in the end, the estimates on the way, and the data."""
    registry = Registry.create(folder, [Parameter("energy", Uniform(-5.0, 5.0))])
    registry.append("track", Gaussian(parameter_names=("energy",), sd=1.0))
    registry.append("shower", Gaussian(parameter_names=("energy",), sd=2.0))
    data = pairs(torch.full((PAIRS, 1), TRUTH), torch.Generator().manual_seed(3))
    fits = {
        "the track alone": registry.estimate(data, only="track"),
        "the plain sum": registry.estimate(data),
        "the same, tested": registry.estimate(data, dependence=pairs),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        s12 = Interaction(("track", "shower"), ("energy",), event_shapes=((1,), (1,)))
    settings = {
        "simulations": 10_000 if quick else 50_000,
        "batch": 200 if quick else 1000,
        "epochs": 10 if quick else 40,
        "seed": 1,
    }
    fit_interaction(s12, prior=registry.parameters, simulate=pairs, **settings)
    print(
        f"interaction: {s12.check(pairs, torch.tensor([TRUTH], dtype=torch.float64), 40_000, seed=9)}; exactly 0.511, and 1"
    )
    registry.append("track-with-shower", s12)
    fits["with the interaction"] = registry.estimate(data, dependence=True)
    for label, fit in fits.items():
        print(f"{label:22s} energy {fit['energy'].value:+.3f} ± {fit['energy'].error:.3f}   {fit.status}")
    print(fits["the same, tested"].dependence)
    return registry, fits, data


def repeated(registry: Registry, fits: dict[str, Estimate], sets: int) -> dict[str, tuple[float, float, float, float]]:
    """Of many data sets: the scatter of θ̂, the error claimed, how often θ̂ ± error held the truth, and the error of that."""
    drawn = pairs(torch.full((sets * PAIRS, 1), TRUTH), torch.Generator().manual_seed(4))
    many = {n: x.reshape(sets, PAIRS, 1) for n, x in drawn.items()}
    godambe = fits["the same, tested"]["energy"].error  # the same for every data set here
    out = {}
    for label, less in (
        ("the track alone", ["shower"]),  # an interaction takes part only where all of its parts do
        ("the plain sum", ["track-with-shower"]),
        ("the same, tested", ["track-with-shower"]),
        ("with the interaction", None),
    ):
        found = registry.estimate_many(many, without=less, shape=False, progress=False)
        claimed = torch.full((sets,), godambe) if label == "the same, tested" else found.sd[:, 0]
        miss = found.theta[:, 0] - TRUTH
        held = float((miss.abs() < claimed).double().mean())
        out[label] = float(miss.std()), float(claimed.median()), held, math.sqrt(held * (1.0 - held) / sets)
    print(f"\n{sets} data sets of {PAIRS} pairs     scatter of θ̂   claimed   68.3 % intervals hold")
    for label, (scatter, claimed, held, error) in out.items():
        print(f"  {label:26s} {scatter:10.4f} {claimed:11.4f}   {held:13.3f} ± {error:.3f}")
    return out


# -- two witnesses ------------------------------------------------------------------------------------------


class Witness(Modality):
    """Says −1 or 1 with noise, whatever the answer is: a scalar that does not depend on θ."""

    def __init__(self, parameter_names: tuple[str, ...] = ("disagree",), sd: float = 0.2) -> None:
        super().__init__(parameter_names, event_shape=(1,))
        self.sd = sd

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        each = torch.stack([-0.5 * ((x[..., 0] - s) / self.sd).square() for s in (-1.0, 1.0)]).logsumexp(0)
        return each + 0.0 * theta[..., 0]


def testimonies(theta: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """What both say where they disagree (θ = 1) or agree (θ = 0), θ (n, 1)."""
    first = torch.randint(0, 2, (len(theta), 1), generator=generator)
    second = (first + theta.round().long()) % 2
    e = 0.2 * torch.randn(len(theta), 2, generator=generator, dtype=torch.float64)
    return {"left": 2.0 * first - 1.0 + e[:, :1], "right": 2.0 * second - 1.0 + e[:, 1:]}


def witnesses(quick: bool, cases: int = 4000) -> tuple[dict[str, float], Tensor, Tensor]:
    """How often the sum and the sum with an interaction are right; what was said, (cases, 2), and the answers (cases,)."""
    space = ParameterSpace([Parameter("disagree", Categorical(torch.tensor([0.5, 0.5])))])
    parts = {"left": Witness(), "right": Witness()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        both = Interaction(("left", "right"), ("disagree",), event_shapes=((1,), (1,)))
    fit_interaction(both, prior=space, simulate=testimonies, simulations=5000, epochs=8 if quick else 20, seed=1)
    answers = torch.randint(0, 2, (cases, 1), generator=torch.Generator().manual_seed(5)).double()
    said = testimonies(answers, torch.Generator().manual_seed(6))
    options = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    plain = torch.stack([part(said[n][:, None], options).double() for n, part in parts.items()]).sum(0)
    joint = plain + both(both.joined(said)[:, None], options).double()
    toss = torch.randint(0, 2, (cases,), generator=torch.Generator().manual_seed(7))
    right = {}
    for label, S in (("the sum", plain), ("with the interaction", joint)):
        guess = torch.where((S[:, 0] - S[:, 1]).abs() < 1e-9, toss, S.argmax(-1))  # equal scalars: toss a coin
        right[label] = float((guess == answers[:, 0]).double().mean())
    told = ", ".join(f"{label} is right in {share:.1%}" for label, share in right.items())
    print(f"\ntwo witnesses, {cases} cases: {told}")
    return right, torch.cat([said["left"], said["right"]], -1), answers[:, 0]


# -- the picture --------------------------------------------------------------------------------------------


def curves(registry: Registry, data: dict[str, Tensor], energy: Tensor) -> dict[str, Tensor]:
    """Log-evidence at energies (n,), each less its maximum."""
    exact = torch.tensor([[1.0, 2.0 * RHO], [2.0 * RHO, 4.0]], dtype=torch.float64)
    x = torch.cat([data["track"], data["shower"]], -1)
    r = x - energy[:, None, None]
    alone = {n: registry.log_evidence({n: data[n]}, energy[:, None]) for n in data}
    S = {
        "the track alone": alone["track"],
        "the plain sum": alone["track"] + alone["shower"],
        "with the interaction": registry.log_evidence(data, energy[:, None]),
        "exact": -0.5 * torch.einsum("eni,ij,enj->e", r, torch.linalg.inv(exact), r),
    }
    return {label: s - s.max() for label, s in S.items()}


def draw(
    S: dict[str, Tensor],
    energy: Tensor,
    sets: dict[str, tuple[float, float, float, float]],
    right: dict[str, float],
    said: Tensor,
    answers: Tensor,
) -> Figure:
    """Three panels: log-evidence of one data set, errors claimed and true over many, and what two witnesses say."""
    figure = Figure(figsize=(11.0, 3.6), dpi=150, layout="constrained")
    left, middle, last = figure.subplots(1, 3)
    styles = {
        "the track alone": (GREY, (4, 2), 1.3),
        "the plain sum": (ORANGE, (), 1.8),
        "with the interaction": (BLUE, (), 1.8),
        "exact": ("black", (1, 2), 1.6),
    }
    for label, s in S.items():
        colour, dashes, width = styles[label]
        left.plot(energy, s, color=colour, dashes=dashes or (None, None), lw=width, label=label)
    left.axvline(TRUTH, color="black", lw=0.6)
    left.set(ylim=(-6.0, 0.3), xlabel="energy  [a.u.]", ylabel="log-evidence less its maximum  [nats]")
    left.set_title(f"One data set of {PAIRS} pairs (line: the truth)", fontsize=10)
    left.legend(fontsize=7.5, loc="center right", frameon=False)
    for k, (scatter, claimed, held, _) in enumerate(sets.values()):
        middle.bar(k - 0.18, scatter, 0.36, color=GREY, label="true" if k == 0 else None)
        middle.bar(k + 0.18, claimed, 0.36, color=BLUE, label="claimed" if k == 0 else None)
        middle.text(k, 1.03 * max(scatter, claimed), f"holds {held:.1%}", ha="center", fontsize=7)
    middle.set_xticks(
        range(len(sets)), ["track\nalone", "plain\nsum", "plain sum,\nGodambe", "with\ninteraction"], fontsize=8
    )
    middle.set(ylabel="error of the energy  [a.u.]", ylim=(0.0, 1.25 * max(v[0] for v in sets.values())))
    middle.set_title("Many data sets: 68.3 % should hold", fontsize=10)
    middle.legend(fontsize=8, loc="upper right", frameon=False, ncols=2)
    for value, colour, marker, label in ((0.0, GREEN, "o", "they agree"), (1.0, ORANGE, "^", "they disagree")):
        some = said[answers == value][:250]
        last.scatter(some[:, 0], some[:, 1], s=9, color=colour, marker=marker, label=label)
    last.set(xlabel="what the left one says", ylabel="what the right one says", xlim=(-2.0, 2.0), ylim=(-2.0, 2.6))
    shares = [f"{share:.1%}" for share in right.values()]
    last.set_title(f"Two witnesses: the sum is right in {shares[0]},\nwith the interaction in {shares[1]}", fontsize=10)
    last.legend(fontsize=8, loc="upper center", ncols=2, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short training and few data sets, in half a minute")
    parser.add_argument(
        "--figure", type=Path, default=Path(__file__).with_suffix(".png"), help="where the picture goes"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        registry, fits, data = detectors(Path(folder) / "registry", given.quick)
        sets = repeated(registry, fits, 200 if given.quick else 500)
        energy = torch.linspace(-0.25, 1.15, 281, dtype=torch.float64)
        S = curves(registry, data, energy)
    right, said, answers = witnesses(given.quick)
    draw(S, energy, sets, right, said, answers).savefig(given.figure)
    print(f"\nthe picture is {given.figure}")


if __name__ == "__main__":
    main()
