"""Training on clients that keep their data: pure functions over a leading axis of clients.

Clients run side by side on one device, or divided among the devices of a mesh.
"""

from optimkit.federated.averaging import FedAvgState as FedAvgState
from optimkit.federated.averaging import federated_averaging as federated_averaging
from optimkit.federated.averaging import fedhyper as fedhyper
from optimkit.federated.clients import FederatedMethod as FederatedMethod
from optimkit.federated.momentum import FedState as FedState
from optimkit.federated.momentum import federated_momentum as federated_momentum
from optimkit.federated.named import fedavg_m as fedavg_m
from optimkit.federated.named import fedavg_m_vr as fedavg_m_vr
from optimkit.federated.named import scaffold_m as scaffold_m
from optimkit.federated.named import scaffold_m_vr as scaffold_m_vr
from optimkit.federated.named import server_direction_as_update as server_direction_as_update
