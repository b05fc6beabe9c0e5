"""Networks over slots, public so that other distributions' families can use them."""

from repdeploy.skeletons.attention import squeeze_excite
from repdeploy.skeletons.fast_vit import FAST_VIT
from repdeploy.skeletons.layers import WINDOW, averaged, layer, summed
from repdeploy.skeletons.mobilenet import MOBILENET, MOBILENET_7X7, mobilenet_v1
from repdeploy.skeletons.net import Architecture, Net, Skeleton, refusing
from repdeploy.skeletons.plain import CIFAR_QUICK, LENET, VGG, VGG_16
from repdeploy.skeletons.rep_ghost import REP_GHOST
from repdeploy.skeletons.rep_lk import REP_LK
from repdeploy.skeletons.rep_mlp import PARTITION, REP_MLP, Partition, square
from repdeploy.skeletons.rep_vgg import REP_VGG, rep_vgg_variants
from repdeploy.skeletons.rep_vit import REP_VIT
from repdeploy.skeletons.resnet import BOTTLENECK_7X7, CIFAR_RESNET, RESNET, RESNET_7X7, cifar_resnet, resnet_variants
from repdeploy.skeletons.wide_resnet import WIDE_RESNET

__all__ = [
    "BOTTLENECK_7X7",
    "CIFAR_QUICK",
    "CIFAR_RESNET",
    "FAST_VIT",
    "LENET",
    "MOBILENET",
    "MOBILENET_7X7",
    "PARTITION",
    "REP_GHOST",
    "REP_LK",
    "REP_MLP",
    "REP_VGG",
    "REP_VIT",
    "RESNET",
    "RESNET_7X7",
    "VGG",
    "VGG_16",
    "WIDE_RESNET",
    "WINDOW",
    "Architecture",
    "Net",
    "Partition",
    "Skeleton",
    "averaged",
    "cifar_resnet",
    "layer",
    "mobilenet_v1",
    "refusing",
    "rep_vgg_variants",
    "resnet_variants",
    "square",
    "squeeze_excite",
    "summed",
]
