"""Projections that read one tensor share one computation, and nothing else can slip into it.

D in_features, G members, E experts, T tokens.
"""

import weakref

import pytest
import torch

from ldmole_ds.layers import ForwardContext
from tests.layers.small_group import OUT, D, E, make_group, projections


def test_members_share_one_computation_and_get_their_own_slice():
    group = make_group()
    layers, x = projections(group), torch.randn(2, 7, D)
    outputs = [layer(x) for layer in layers]
    assert len(group.dispatcher.calls) == 1
    for i, (layer, output) in enumerate(zip(layers, outputs, strict=True)):
        # The same weights in a group of their own.
        alone = make_group(group.members[i : i + 1], out=OUT[i : i + 1], lambda_mlp=group.lambda_mlp)
        with torch.no_grad():
            alone.gate.copy_(group.gate[i : i + 1])
            alone.lora_A.copy_(group.lora_A[i : i + 1])
            alone.lora_B[0].copy_(group.lora_B[i])
        (update,) = alone(x)
        torch.testing.assert_close(output, layer.base_layer(x) + update)
        assert update.abs().max() > 0.1
    # The next call of the first member starts anew.
    layers[0](x)
    assert len(group.dispatcher.calls) == 2


def test_another_tensor_object_over_the_same_memory_is_the_same_input():
    group = make_group()
    q, k, v = projections(group)
    x = torch.randn(2, 7, D)
    q(x), k(x.view_as(x)), v(x.detach())
    assert len(group.dispatcher.calls) == 1


def changed_in_place(x):
    return x.mul_(2)


@pytest.mark.parametrize("other", [torch.clone, changed_in_place, lambda x: x[:, 1:], lambda x: x.double()])
def test_another_input_raises_with_the_remedy(other):
    group = make_group()
    q, k, _ = projections(group)
    x = torch.randn(2, 7, D)
    q(x)
    with pytest.raises(RuntimeError, match="k was called on another input than q.*input_groups='single'"):
        group.update_of(1, other(x))
    # The group has recovered.
    assert torch.equal(q(x), q(x)) and k(x).shape == (2, 7, OUT[1])


def test_another_gradient_mode_raises():
    group = make_group()
    q, k, _ = projections(group)
    x = torch.randn(2, 7, D)
    with torch.no_grad():
        q(x)
    with pytest.raises(RuntimeError, match="another input"):
        k(x)


def test_a_member_cannot_take_its_slice_twice():
    q, k, _ = projections(make_group())
    x = torch.randn(2, 7, D)
    q(x), k(x)
    with pytest.raises(RuntimeError, match="another input"):
        k(x)


def test_the_input_is_held_until_the_last_member_took_its_slice():
    """So its memory cannot be given to another tensor, which would look like the same input."""
    group = make_group()
    x = torch.randn(2, 7, D)
    with torch.no_grad():
        first, alive = x.clone(), weakref.ref(x)
        group.update_of(0, x)
        del x
        # The dispatcher's notes hold on to it as well.
        group.dispatcher.calls.clear()
        assert alive() is not None and torch.equal(alive(), first)
        group.update_of(1, alive())
        group.update_of(2, alive())
        assert alive() is None


def test_without_a_pending_result_any_member_starts_the_group():
    group = make_group()
    q, k, v = projections(group)
    x = torch.randn(2, 7, D)
    expected = [layer(x) for layer in (q, k, v)]
    assert torch.equal(k(x), expected[1]) and torch.equal(v(x), expected[2])
    assert len(group.dispatcher.calls) == 2
    # The first member always starts anew, also when its slice is still there.
    assert torch.equal(q(x), expected[0])
    assert len(group.dispatcher.calls) == 3


def test_clear_forgets_what_was_pending():
    group = make_group()
    q, k, _ = projections(group)
    q(torch.randn(2, 7, D))
    group.clear()
    x = torch.randn(2, 7, D)
    expected = k(x)
    group.clear()
    q(x)
    assert torch.equal(k(x), expected)


def test_one_dropout_mask_for_router_lambda_and_all_experts():
    group = make_group(("q", "k"), out=[5, 5], dropout=0.5)
    with torch.no_grad():
        for tensor in (group.gate, group.lora_A):
            tensor[1] = tensor[0]
        group.lora_B[1].copy_(group.lora_B[0])
    x = torch.randn(2, 50, D)
    context = ForwardContext()
    with group.holder.use(context):
        q, k = group(x)
    # Rows of one product may round differently by where they lie; another mask would change every value.
    torch.testing.assert_close(q, k, rtol=1e-5, atol=1e-5, msg="equal members under one mask must agree")
    (dropped, _), (record,) = group.dispatcher.calls[0], context.records
    # Half is zero, the rest is doubled; and that is what router and lambda MLP have read.
    assert set(torch.unique(dropped.reshape(x.shape) / x).tolist()) == {0.0, 2.0}
    torch.testing.assert_close(record.logits_TGE[:, 0], dropped @ group.gate[0].t())
    torch.testing.assert_close(record.lam_T, group.lambda_mlp(dropped)[0])
    group.eval()
    assert torch.equal(group(x)[0], group(x)[0])


def test_padding_is_not_routed():
    group, x = make_group(), torch.randn(2, 4, D)
    mask = torch.tensor([[False, False, True, True], [True, True, True, True]])
    other = torch.where(mask.unsqueeze(-1), x, torch.randn(2, 4, D))
    contexts = [ForwardContext(padding_mask=mask), ForwardContext(padding_mask=mask)]
    outputs = []
    for context, value in zip(contexts, (x, other), strict=True):
        with group.holder.use(context):
            outputs.append(group(value)[0])
        probs = group.dispatcher.calls[-1][1].view(2, 4, 3, E)
        assert (probs[~mask] == 0).all() and (probs[mask].sum(-1) > 0.99).all()
        assert torch.equal(context.records[0].mask_T, mask.flatten())
    assert torch.equal(*outputs) and not outputs[0][~mask].any() and outputs[0][mask].all(-1).all()

    routed = make_group(mask_padding=False)
    with routed.holder.use(ForwardContext(padding_mask=mask)):
        routed(x)
    assert (routed.dispatcher.calls[0][1].sum(-1) > 0.99).all()


def test_half_precision_in_half_precision_out_routing_in_float32():
    group, x = make_group(dtype=torch.bfloat16), torch.randn(2, 7, D, dtype=torch.bfloat16)
    context = ForwardContext()
    with group.holder.use(context):
        outputs = group(x)
    record = context.records[0]
    assert {o.dtype for o in outputs} == {torch.bfloat16}
    assert {t.dtype for t in (record.logits_TGE, record.probs_TGE, record.lam_T)} == {torch.float32}
    exact = x.float().view(-1, D) @ group.gate[0].float().t()
    torch.testing.assert_close(record.logits_TGE[:, 0], exact)


@pytest.mark.parametrize("shape", [(0, 7, D), (2, 0, D), (0, D)])
def test_no_token_at_all(shape):
    group = make_group()
    x = torch.zeros(shape, requires_grad=True)
    outputs = group(x)
    assert [o.shape for o in outputs] == [(*shape[:-1], out) for out in OUT]
    sum(o.sum() for o in outputs).backward()
    assert x.grad.shape == shape and not group.lora_A.grad.any()
