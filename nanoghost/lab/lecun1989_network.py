"""The digit network of LeCun et al. 1989 and its training, for many networks at once.

All networks of a recipe, one for each fold of the data and each seed, are trained together: their weights are stacked,
and each layer is one batched matmul. The layers are named as in the paper: H1 and H2 are convolutions, H3 is a fully
connected layer.

R networks, B digits in a batch, N training digits, C feature maps, H, W height and width of an image, K = 10 classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

DROPOUT = 0.25
BACKGROUND = -1.0  # value of a background pixel


@dataclass(frozen=True)
class DigitRecipe:
    """How the network is built and trained. The defaults are those of 1989."""

    loss: str = "squared"
    """squared (targets -1 and 1) or softmax."""
    optimizer: str = "sgd"
    """sgd, or adam with a learning rate that falls to 0."""
    batch: int = 1
    epochs: int = 23
    shift: bool = False
    """Data augmentation: shift each digit by up to a pixel, differently in each epoch."""
    relu: bool = False
    """ReLU instead of tanh, and dropout before the third layer."""
    maps: int = 12
    """Feature maps of each of the first two layers."""
    data_fraction: float = 1.0
    """Fraction of the training digits that is used."""

    @property
    def connected_maps(self) -> int:
        """Number of maps of the first layer that a map of the second layer sees: 8 of 12."""
        return self.maps * 2 // 3


class Networks:
    """R networks with the same shape."""

    def __init__(self, count: int, recipe: DigitRecipe, seeds: list[int]):
        """`seeds`: seed of the initial weights of each network."""
        C = recipe.maps
        shapes = {  # (shape of a parameter, its fan-in)
            "h1": ((C, 1, 5, 5), 25),
            "h1_bias": ((C, 8, 8), 0),
            "h2": ((C, C, 5, 5), 25 * recipe.connected_maps),
            "h2_bias": ((C, 4, 4), 0),
            "h3": ((30, C * 16), C * 16),
            "h3_bias": ((30,), 0),
            "out": ((10, 30), 30),
            "out_bias": ((10,), 0),
        }
        self.count, self.recipe = count, recipe
        self.parameters: dict[str, torch.Tensor] = {}
        for name, (shape, fan_in) in shapes.items():
            tensors = [initial_values(shape, fan_in, seed) for seed in seeds]
            self.parameters[name] = torch.stack(tensors).requires_grad_()
        maps = torch.arange(C)
        is_connected_CC = (maps - maps[:, None]) % C < recipe.connected_maps  # [map of H2, map of H1]
        self.connections = is_connected_CC.float()[None, :, :, None, None]

    def parameter_count(self) -> int:
        """Number of parameters of one network, without the weights of maps that are not connected."""
        C = self.recipe.maps
        unconnected = C * (C - self.recipe.connected_maps) * 25
        return sum(p[0].numel() for p in self.parameters.values()) - unconnected

    def forward(self, x_RBHW, training: bool = False):
        """Digits (R, B, 16, 16), from -1 to 1 -> logits (R, B, K)."""
        R, C, p = self.count, self.recipe.maps, self.parameters
        activation = torch.relu if self.recipe.relu else torch.tanh

        def convolution(x_RBCHW, weight, bias):
            """5 x 5 convolution with stride 2, padded with background; each position has its own bias."""
            side = x_RBCHW.size(-1) // 2
            # For each network a matrix of patches: (R, B * positions, input maps * 25)
            patches = F.unfold(F.pad(x_RBCHW.flatten(0, 1), (2, 2, 2, 2), value=BACKGROUND), 5, stride=2)
            patches = patches.view(R, -1, *patches.shape[1:]).transpose(2, 3).flatten(1, 2)
            y = torch.bmm(patches, weight.flatten(2).mT).view(R, -1, side * side, C).transpose(2, 3)
            return activation(y + bias.flatten(2)[:, None]).unflatten(3, (side, side))

        x = convolution(x_RBHW[:, :, None], p["h1"], p["h1_bias"])
        x = convolution(x, p["h2"] * self.connections, p["h2_bias"]).flatten(2)
        if self.recipe.relu:
            x = F.dropout(x, DROPOUT, training)
        x = activation(torch.baddbmm(p["h3_bias"][:, None], x, p["h3"].mT))
        return torch.baddbmm(p["out_bias"][:, None], x, p["out"].mT)

    def losses(self, x_RBHW, labels_RB):
        """The loss of each network, (R,)."""
        logits_RBK = self.forward(x_RBHW, training=True)
        if self.recipe.loss == "softmax":
            losses = F.cross_entropy(logits_RBK.flatten(0, 1), labels_RB.flatten(), reduction="none")
            return losses.view_as(labels_RB).mean(1)
        targets_RBK = F.one_hot(labels_RB, 10) * 2.0 - 1.0
        return (torch.tanh(logits_RBK) - targets_RBK).square().mean((1, 2))


def initial_values(shape: tuple[int, ...], fan_in: int, seed: int) -> torch.Tensor:
    """Random uniform values within 2.4 / sqrt(fan-in); zeros for biases, which have a fan-in of 0."""
    if not fan_in:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape).uniform_(-1, 1, generator=generator) * (2.4 / fan_in**0.5)


def train(
    recipe: DigitRecipe,
    digits,
    labels,
    train_indices: list[torch.Tensor],
    seeds: list[int],
    learning_rates: list[float],
    show: Callable[[dict], None],
) -> Networks:
    """Train R networks: `train_indices` (their training digits), `seeds` and `learning_rates` have R entries.

    `show` is called with an event after each epoch.
    """
    count = min(map(len, train_indices))
    networks = Networks(len(train_indices), recipe, seeds)
    learning_rate_R = torch.tensor(learning_rates)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    torch.manual_seed(seeds[0])  # for dropout
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in networks.parameters.items()}
    steps_per_epoch = count // recipe.batch
    steps = steps_per_epoch * recipe.epochs
    step = 0
    for epoch in range(recipe.epochs):
        orders = []
        for indices, generator in zip(train_indices, generators):
            orders.append(indices[torch.randperm(len(indices), generator=generator)[:count]])
        order_RN = torch.stack(orders)
        for start in range(0, steps_per_epoch * recipe.batch, recipe.batch):
            batch_RB = order_RN[:, start : start + recipe.batch]
            x_RBHW = shift(digits[batch_RB], generators[0]) if recipe.shift else digits[batch_RB]
            networks.losses(x_RBHW, labels[batch_RB]).sum().backward()
            step += 1
            multiplier = 1.0 if recipe.optimizer == "sgd" else 1 - step / steps
            optimizer_step(networks, recipe, learning_rate_R * multiplier, moments, step)
        show({"stage": "lecun1989", "step": epoch, "steps": recipe.epochs})
    return networks


@torch.no_grad()
def optimizer_step(networks: Networks, recipe: DigitRecipe, learning_rate_R, moments: dict, step: int) -> None:
    """Update all parameters, each network with its own learning rate. `moments`: parameter name -> Adam's averages."""
    for name, p in networks.parameters.items():
        update = p.grad if recipe.optimizer == "sgd" else adam_update(p.grad, *moments[name], step)
        ones = [1] * (p.dim() - 1)
        p.sub_(learning_rate_R.view(-1, *ones) * update)
        p.grad = None


def adam_update(gradient, exp_avg, exp_avg_sq, step: int):
    """Adam with beta1 = 0.9 and beta2 = 0.95. Updates both averages in place."""
    exp_avg.lerp_(gradient, 0.1)
    exp_avg_sq.lerp_(gradient.square(), 0.05)
    return (exp_avg / (1 - 0.9**step)) / ((exp_avg_sq / (1 - 0.95**step)).sqrt() + 1e-8)


def shift(x_RBHW, generator):
    """Shift each digit at random by -1, 0 or 1 pixels in both directions, and fill with background."""
    R, B, H, W = x_RBHW.shape
    padded = F.pad(x_RBHW, (1, 1, 1, 1), value=BACKGROUND)
    dy, dx = torch.randint(0, 3, (2, R, B, 1, 1), generator=generator)
    rows, columns = torch.arange(H).view(1, 1, H, 1) + dy, torch.arange(W).view(1, 1, 1, W) + dx
    return padded[torch.arange(R).view(R, 1, 1, 1), torch.arange(B).view(1, B, 1, 1), rows, columns]


@torch.no_grad()
def error_rates(networks: Networks, digits, labels, test_indices: list[torch.Tensor]) -> list[float]:
    """Error rate of each network on its test digits."""
    count = min(map(len, test_indices))  # folds differ by one digit
    indices_RN = torch.stack([indices[:count] for indices in test_indices])
    predictions_RN = networks.forward(digits[indices_RN]).argmax(-1)
    return (predictions_RN != labels[indices_RN]).float().mean(1).tolist()
