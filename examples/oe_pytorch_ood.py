"""Outlier Exposure with a mined subset in pytorch-ood: an image folder (a sub-folder a class) and a subset.

python examples/oe_pytorch_ood.py IMAGES runs/demo/subset-0.01
"""

import sys

import torch
from pytorch_ood.loss import OutlierExposureLoss
from pytorch_ood.model import WideResNet
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from miner import load_subset

scale = v2.Compose([v2.ToImage(), v2.Resize(32), v2.CenterCrop(32), v2.ToDtype(torch.float32, scale=True)])
known = ImageFolder(sys.argv[1], scale)
both = known + load_subset(sys.argv[2], scale)  # labels: the class, or -1, which pytorch-ood takes for OOD
net, criterion = WideResNet(num_classes=len(known.classes)), OutlierExposureLoss(alpha=0.5)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
for images, labels in torch.utils.data.DataLoader(both, batch_size=128, shuffle=True):
    loss = criterion(net(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.3f} on {(labels < 0).sum()} outliers and {(labels >= 0).sum()} known images")
