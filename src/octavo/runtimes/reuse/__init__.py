"""The whole network and its outer part, executed as two graphs that pass on deep features."""

from octavo.runtimes.reuse.execute import Reuser as Reuser
from octavo.runtimes.reuse.execute import with_reuse as with_reuse
from octavo.runtimes.reuse.networks import most_depth as most_depth
