"""HAQ's agent (arXiv 1811.08886), as a yardstick for the budgeted search: reinforcement learning by stable-baselines3.

Written after the idea, not after its code: one step of an episode for each tensor, in the order of the layers, weights
and inputs apart; an action in [0, 1] is the bits; where all bits together exceed the budget, they are lowered one
tensor after the other until they do not; DDPG without discount, exploration that shrinks by 1 % an episode. What the
agent sees of a tensor is its place, its bytes and products, the kind of its layer, whether it is a weight, and its last
action. The reward is what our search minimises too, minus the divergence of the predictions, and not the accuracy after
an epoch of finetuning: on as few images as a search can afford hundreds of times, accuracy is coarser. Learning rates,
networks and noise were not tuned.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import gymnasium
import numpy as np
from gymnasium import spaces
from stable_baselines3 import DDPG
from stable_baselines3.common.noise import NormalActionNoise

from quantformer_hf.layer_bits import LayerBits
from quantformer_hf.mixed_precision.budget import Budget
from quantformer_hf.mixed_precision.cost import CostModel
from quantformer_hf.mixed_precision.search_space import Widths


#: Of the exploration's noise, at first, and what is left of it after each episode. In stable-baselines3 actions lie in
#: [-1, 1]: this is 0.5 of [0, 1].
NOISE, NOISE_KEPT = 1.0, 0.99

#: Episodes before the networks learn.
WARM_UP_EPISODES = 20


@dataclass
class Episodes:
    """What the agent has tried: the best allocation, and its loss after each episode."""

    best: Widths | None = None
    losses: list[float] = field(default_factory=list)


class AllocationEnvironment(gymnasium.Env):
    """An episode gives each tensor its bits and ends with minus `evaluate` of the allocation.

    Args:
        costs: of the choices.
        budget: that every allocation is made to keep.
        evaluate: what an allocation loses.
    """

    def __init__(self, costs: CostModel, budget: Budget, evaluate: Callable[[Widths], float]):
        self.costs, self.budget, self.evaluate = costs, budget, evaluate
        space = costs.space
        self.tensors: list[tuple[str, bool]] = []
        for name, quantizer in space.inputs.items():
            if (quantizer, False) not in self.tensors:
                self.tensors.append((quantizer, False))
            self.tensors.append((name, True))
        self.features = self._features()
        self.observation_space = spaces.Box(0.0, 1.0, (self.features.shape[1] + 1,), np.float32)
        self.action_space = spaces.Box(0.0, 1.0, (1,), np.float32)
        self.episodes = Episodes()
        self.actions: list[float] = []

    def _features(self) -> np.ndarray:
        """Of each tensor, scaled to [0, 1]: its place, bytes at eight bits, products, kind of its layer, weight or not."""
        space = self.costs.space
        readers = {q: [n for n, of in space.inputs.items() if of == q] for q in space.quantizers}
        kinds = sorted({name.rpartition(".")[2] for name in space.inputs})
        rows = []
        for index, (name, is_weight) in enumerate(self.tensors):
            layers = [name] if is_weight else readers[name]
            products = sum(self.costs.products[layer].multiplications for layer in layers)
            parameters = sum(self.costs["bytes"].shares[layer][space.weight_bits[-1], 8] for layer in layers)
            rows.append([index, parameters, products, kinds.index(layers[0].rpartition(".")[2]), is_weight])
        table = np.array(rows, dtype=np.float32)
        return (table - table.min(0)) / np.maximum(np.ptp(table, axis=0), 1e-9)

    def _observation(self) -> np.ndarray:
        index = min(len(self.actions), len(self.tensors) - 1)
        return np.append(self.features[index], self.actions[-1] if self.actions else 0.0).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.actions = []
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.actions.append(float(action[0]))
        if len(self.actions) < len(self.tensors):
            return self._observation(), 0.0, False, False, {}
        widths = self.within_budget(self.chosen())
        loss = self.evaluate(widths)
        if loss < min(self.episodes.losses, default=np.inf):
            self.episodes.best = widths
        self.episodes.losses.append(loss)
        return self._observation(), -loss, True, False, {}

    def chosen(self) -> list[int]:
        """The place of each tensor's bits among the candidates."""
        space = self.costs.space
        sizes = [len(space.weight_bits if is_weight else space.activation_bits) for _, is_weight in self.tensors]
        return [min(int(action * size), size - 1) for action, size in zip(self.actions, sizes, strict=True)]

    def within_budget(self, places: list[int]) -> Widths:
        """Lower the bits of one tensor after the other, round and round, until the budget is kept."""
        places = list(places)
        while True:
            for index in range(len(places)):
                widths = self.widths(places)
                if self.costs[self.budget.unit].total(widths) <= self.budget.most:
                    return widths
                places[index] = max(places[index] - 1, 0)

    def widths(self, places: list[int]) -> Widths:
        space = self.costs.space
        place = dict(zip(self.tensors, places, strict=True))
        return {
            name: LayerBits(
                space.weight_bits[place[name, True]], space.activation_bits[place[space.inputs[name], False]]
            )
            for name in space.inputs
        }


class ShrinkingNoise(NormalActionNoise):
    """Noise that is less in each episode; `reset` is called at the end of one."""

    def reset(self) -> None:
        self._sigma = self._sigma * NOISE_KEPT


def search_by_agent(
    costs: CostModel, budget: Budget, evaluate: Callable[[Widths], float], episodes: int, seed: int = 0
) -> Episodes:
    """Train an agent for `episodes`; the best allocation that it tried is the one found."""
    environment = AllocationEnvironment(costs, budget, evaluate)
    steps = len(environment.tensors)
    agent = DDPG(
        "MlpPolicy",
        environment,
        learning_rate=1e-3,
        buffer_size=2000 * steps,
        learning_starts=WARM_UP_EPISODES * steps,
        batch_size=64,
        tau=0.01,
        gamma=1.0,
        action_noise=ShrinkingNoise(np.zeros(1), np.full(1, NOISE)),
        policy_kwargs={"net_arch": [400, 300], "optimizer_kwargs": {"fused": True}},
        seed=seed,
        device="cpu",
    )
    agent.learn(episodes * steps)
    return environment.episodes
