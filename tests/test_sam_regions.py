"""SAM-DETR's matrices against torchvision's RoIAlign and torch's grid_sample, with gradients."""
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_convert, roi_align

import sam_detr

H, W, BINS = 9, 13, 7
KINDS = {  # centre and size of the boxes in parts of the map: (least, most) of each
    "inside": ((0.3, 0.7), (0.05, 0.5)),
    "over the edge": ((-0.1, 1.1), (0.1, 1.0)),
    "larger than the map": ((0.0, 1.0), (1.0, 2.0)),
    "thin": ((0.0, 1.0), (1e-6, 0.02)),
    "empty": ((0.0, 1.0), (0.0, 0.0)),
}


def random_boxes(kind):
    """(cx, cy, w, h) in cells: [2, 60, 4]."""
    torch.manual_seed(0)
    centre, size = (torch.empty(2, 60, 2, dtype=torch.double).uniform_(*limits) for limits in KINDS[kind])
    return torch.cat([centre, size], dim=-1) * torch.tensor([W, H, W, H])


def matrices(boxes):
    """rows [B, Q, 7, H] and columns [B, Q, 7, W]."""
    x, y, w, h = boxes.unbind(-1)
    return sam_detr.bin_weights(y, h, H, BINS), sam_detr.bin_weights(x, w, W, BINS)


def regions_of(feature_map, boxes):
    """torchvision's regions: [B, Q, C, 7, 7]."""
    regions = roi_align(feature_map, list(box_convert(boxes, "cxcywh", "xyxy")), BINS, aligned=True)
    return regions.unflatten(0, boxes.shape[:2])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_times_map_times_columns_is_roi_align(kind):
    boxes, feature_map = random_boxes(kind), torch.randn(2, 3, H, W, dtype=torch.double)
    rows, columns = matrices(boxes)
    regions = torch.einsum("bqih,bchw,bqjw->bqcij", rows, feature_map, columns)
    torch.testing.assert_close(regions, regions_of(feature_map, boxes))
    assert regions.any() == (kind != "empty")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_a_point_in_the_bins_give_what_grid_sample_reads(kind):
    """Also their gradients, at the corners of a box and at its centre, which is the centre of a bin."""
    boxes, feature_map = random_boxes(kind), torch.randn(2, 3, H, W, dtype=torch.double)
    in_box = torch.rand(2, 60, 6, 2, dtype=torch.double) * 2 - 1  # [B, Q, M, 2]
    in_box[:, :, 0], in_box[:, :, 1], in_box[:, :, 2] = 0, -1, 1
    theirs, ours = in_box.clone().requires_grad_(), in_box.requires_grad_()
    regions = regions_of(feature_map, boxes).flatten(0, 1)  # [B*Q, C, 7, 7]
    expected = F.grid_sample(regions, theirs.view(120, 1, 6, 2), align_corners=False)
    rows, columns = matrices(boxes)
    x, y = (sam_detr.linear_weights(((ours + 1) * BINS / 2 - 0.5)[..., i], BINS) for i in (0, 1))
    content = torch.einsum("bqmh,bchw,bqmw->bqcm", y @ rows, feature_map, x @ columns)
    torch.testing.assert_close(content.flatten(0, 1), expected[:, :, 0])
    content.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad[:, :, 0].any() == (kind != "empty"), "points at the centre of the box could not move"
