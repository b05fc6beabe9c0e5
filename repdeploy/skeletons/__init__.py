"""Networks over slots, public so that other distributions' families can use them."""

from repdeploy.skeletons.attention import squeeze_excite
from repdeploy.skeletons.layers import WINDOW, averaged, layer, summed
from repdeploy.skeletons.mobilenet import MOBILENET, MOBILENET_7X7, mobilenet_v1
from repdeploy.skeletons.net import Architecture, Net, Skeleton, refusing
from repdeploy.skeletons.plain import CIFAR_QUICK, LENET, VGG
from repdeploy.skeletons.rep_ghost import REP_GHOST
from repdeploy.skeletons.rep_lk import REP_LK
from repdeploy.skeletons.rep_vgg import REP_VGG, rep_vgg_variants
from repdeploy.skeletons.resnet import BOTTLENECK_7X7, CIFAR_RESNET, RESNET, RESNET_7X7, resnet_variants
from repdeploy.skeletons.wide_resnet import WIDE_RESNET

__all__ = [
    "BOTTLENECK_7X7",
    "CIFAR_QUICK",
    "CIFAR_RESNET",
    "LENET",
    "MOBILENET",
    "MOBILENET_7X7",
    "REP_GHOST",
    "REP_LK",
    "REP_VGG",
    "RESNET",
    "RESNET_7X7",
    "VGG",
    "WIDE_RESNET",
    "WINDOW",
    "Architecture",
    "Net",
    "Skeleton",
    "averaged",
    "layer",
    "mobilenet_v1",
    "refusing",
    "rep_vgg_variants",
    "resnet_variants",
    "squeeze_excite",
    "summed",
]
