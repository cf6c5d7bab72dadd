"""The same network as others execute it, ready to be timed beside ours."""

from octavo.evaluation.peers.choose import PEERS as PEERS
from octavo.evaluation.peers.choose import Built as Built
from octavo.evaluation.peers.choose import Peer as Peer
from octavo.evaluation.peers.choose import Task as Task
from octavo.evaluation.peers.choose import build as build
from octavo.evaluation.peers.choose import chosen as chosen
