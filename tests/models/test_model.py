import pytest
import timm
import torch

from l2r2_models import L2R2, L2R2Error, ViewSpec, make_views


def tiny(**options):
    torch.manual_seed(0)
    return timm.create_model("l2r2", backbone="resnet10t", num_classes=4, **options)


def test_without_boxes_the_output_is_that_of_the_full_head_exactly():
    model, x = tiny().eval(), torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), model.heads["full"](model.backbone(x)))


def test_forward_views_equals_each_branch_alone():
    model = tiny().eval()
    full, fg = torch.randn(2, 3, 3, 32, 32)
    out = model.forward_views(full, fg)
    assert torch.allclose(out.full, model.heads["full"](model.backbone(full)), atol=1e-5)
    assert torch.allclose(out.fg, model.heads["fg"](model.backbone(fg)), atol=1e-5)
    assert out.bg is None


@pytest.mark.parametrize("shared", [True, False])
def test_rows_without_a_box_have_the_prediction_of_full(shared):
    model = tiny(shared=shared).eval()
    full, fg = torch.randn(2, 5, 3, 32, 32)
    has_fg = torch.tensor([True, False, True, False, False])
    out = model.forward_views(full, fg, has_fg)
    assert torch.equal(out.fused[~has_fg], out.full[~has_fg])


def test_without_a_full_branch_rows_without_a_box_have_the_prediction_of_fg():
    model = tiny(branches=("fg", "bg"), fusion="average").eval()
    fg, bg = torch.randn(2, 2, 3, 32, 32)
    out = model.forward_views(fg=fg, bg=bg, has_fg=torch.tensor([True, False]))
    assert torch.allclose(out.fused[0], (out.fg[0] + out.bg[0]) / 2)
    assert torch.equal(out.fused[1], out.fg[1])


def test_independent_backbones_have_their_own_weights_and_twice_the_parameters():
    shared, own = tiny(), tiny(shared=False)
    count = sum(p.numel() for p in shared.backbone.parameters())
    assert sum(p.numel() for p in own.parameters()) == sum(p.numel() for p in shared.parameters()) + count
    full, fg = torch.randn(2, 2, 3, 32, 32)
    own.eval().forward_views(full, fg).fg.sum().backward()
    assert all(p.grad is None for p in own.backbone.parameters())
    assert all(p.grad is not None for p in own.branch_backbones["fg"].parameters())


def test_a_model_of_one_branch_is_a_plain_classifier():
    model = tiny(branches=("full",)).eval()
    x = torch.randn(2, 3, 32, 32)
    out = model.forward_views(x)
    assert torch.equal(out.fused, out.full) and out.fg is None
    plain = sum(p.numel() for p in timm.create_model("resnet10t", num_classes=4).parameters())
    assert sum(p.numel() for p in model.parameters()) == plain


def test_boxes_given_to_forward_cut_the_fg_out_of_the_tensor():
    model, x = tiny(fusion={"name": "robust", "threshold": 0.0}).eval(), torch.randn(2, 3, 32, 32)
    boxes = torch.tensor([[4.0, 6, 20, 30], [float("nan")] * 4])
    logits = model(x, boxes)
    canvas = torch.zeros(1, 3, 24, 24)
    canvas[:, :, :, 4:20] = x[:1, :, 6:30, 4:20]
    crop = torch.nn.functional.interpolate(canvas, (32, 32), mode=model.view_spec.interpolation, antialias=True)
    assert torch.allclose(logits[0], model.heads["fg"](model.backbone(crop))[0], atol=1e-3)
    assert torch.allclose(logits[1], model(x)[1], atol=1e-5)


def test_batch_norm_sees_the_mixture_of_the_views_and_keeps_its_statistics_for_both():
    model = tiny().train()
    full, fg = torch.randn(8, 3, 32, 32), 5 + 3 * torch.randn(8, 3, 32, 32)
    norm = next(m for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d))
    norm.momentum = 1.0
    inputs = []
    norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    model.forward_views(full, fg)
    assert len(inputs) == 1 and len(inputs[0]) == 16  # one pass over both views
    assert torch.allclose(norm.running_mean, inputs[0].mean((0, 2, 3)), atol=1e-4)
    model.eval()
    together = model.forward_views(full, fg).full
    assert torch.allclose(together, model.forward_views(full, full).full, atol=1e-4)  # in evaluation rows are independent


def test_training_without_boxes_is_the_mean_of_the_heads_and_reaches_every_parameter():
    for options in ({}, {"shared": False}, {"branches": ("full", "fg", "bg")}):
        model = tiny(**options).train()
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        assert all(p.grad is not None for p in model.parameters()), options


def test_mistakes_are_sentences():
    with pytest.raises(L2R2Error, match='Unknown branch "background"; choose from full, fg, bg'):
        L2R2("resnet10t", branches=("full", "background"))
    with pytest.raises(L2R2Error, match="without repetition"):
        L2R2("resnet10t", branches=("full", "full"))
    with pytest.raises(L2R2Error, match='Unknown fusion "rubust"'):
        L2R2("resnet10t", fusion="rubust")
    with pytest.raises(L2R2Error, match='Unknown timm backbone "resnat18"; close names: resnet18'):
        L2R2("resnat18")
    with pytest.raises(L2R2Error, match='Unknown timm backbone "resnat18"'):
        timm.create_model("l2r2", backbone="resnat18")
    with pytest.raises(L2R2Error, match="has the branches full, fg, not bg"):
        tiny().forward_branches(bg=torch.randn(1, 3, 32, 32))
    with pytest.raises(L2R2Error, match="Pass at least one view"):
        tiny().forward_branches()
    with pytest.raises(L2R2Error, match=r"boxes must be \[B, 4\]"):
        tiny()(torch.randn(2, 3, 32, 32), torch.zeros(3, 4))


def test_scripted_and_traced_models_refuse_boxes_instead_of_ignoring_them():
    from timm.models import get_notrace_functions
    from torchvision.models.feature_extraction import NodePathTracer

    model, x, boxes = tiny().eval(), torch.randn(1, 3, 32, 32), torch.tensor([[1.0, 1, 9, 9]])
    with pytest.raises(Exception, match="whole images only"):
        torch.jit.script(model)(x, boxes)
    graph = NodePathTracer(autowrap_functions=get_notrace_functions(), param_shapes_constant=True).trace(model)
    traced = torch.fx.GraphModule(model, graph)
    assert torch.equal(traced(x, None), model(x))
    with pytest.raises(ValueError, match="whole images only"):
        traced(x, boxes)


def test_views_that_were_cut_fit_the_model():
    model = tiny().eval()
    model.view_spec = ViewSpec.from_pretrained_cfg(model.pretrained_cfg, size=32)
    pixels = torch.randint(0, 255, (50, 70, 3), dtype=torch.uint8)
    views = make_views([pixels], torch.tensor([[3.0, 4, 30, 40]]), model.view_spec)
    assert model.forward_views(views.full, views.fg, views.has_fg).fused.shape == (1, 4)
