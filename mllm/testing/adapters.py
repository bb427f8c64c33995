"""Checks the contract of an adapter: it begins as nothing, trains alone, and is the frozen module while disabled.

Knows how adapters are switched off. Does not know what an adapter computes.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mllm.adapters import adapters_disabled


def check_adapter(module: nn.Module, inject: Callable[[nn.Module], None], call: Callable[[nn.Module], Tensor]) -> None:
    """Checks everything an adapter promises. The module holds the adapter afterwards, with random weights.

    Args:
        module: without an adapter, in eval mode.
        inject: puts the adapter in, in place.
        call: runs the module on some inputs, with all that the adapter needs to know of the rows.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    frozen = {id(parameter): name for name, parameter in module.named_parameters()}
    values = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    with torch.no_grad():
        before = call(module)
    inject(module)
    new = {name: weight for name, weight in module.named_parameters() if id(weight) not in frozen}
    assert new, "the adapter has no weights of its own"
    for weight in module.parameters():
        if id(weight) in frozen:
            assert not weight.requires_grad, f"{frozen[id(weight)]} of the frozen module trains"
            assert weight.equal(values[frozen[id(weight)]]), f"{frozen[id(weight)]} of the frozen module has changed"
    assert all(weight.requires_grad for weight in new.values()), "a weight of the adapter does not train"
    with torch.no_grad():
        assert call(module).equal(before), "a new adapter changes what the module computes"
        generator = torch.Generator().manual_seed(0)
        for weight in new.values():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
        assert not call(module).equal(before), "the adapter changes nothing, whatever its weights"
        with adapters_disabled(module):
            assert call(module).equal(before), "a disabled adapter is not the frozen module bit for bit"
        assert not call(module).equal(before), "the adapter stays disabled"
    call(module).square().sum().backward()
    missing = [name for name, weight in new.items() if weight.grad is None]
    assert not missing, f"{missing[0]} gets no gradient, and other processes would wait for it"
    module.zero_grad(set_to_none=True)
