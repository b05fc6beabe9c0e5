"""Networks over slots, public so that other distributions' families can use them."""

from repdeploy.skeletons.attention import squeeze_excite
from repdeploy.skeletons.net import Net, Skeleton
from repdeploy.skeletons.rep_vgg import REP_VGG

__all__ = ["REP_VGG", "Net", "Skeleton", "squeeze_excite"]
