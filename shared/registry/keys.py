"""Every Redis key. All of them live by a heartbeat's time to live; none is permanent.

| key                            | type | holds                                        | written by            |
|--------------------------------|------|----------------------------------------------|-----------------------|
| pdserve:v1:instance:<id>       | str  | InstanceRecord as JSON                       | the instance          |
| pdserve:v1:gateway:<id>        | str  | GatewayRecord as JSON                        | the gateway           |
| pdserve:v1:groups              | set  | group names                                  | instances of it       |
| pdserve:v1:group:<name>        | set  | instance ids                                 | instances of it       |
| pdserve:v1:gateways            | set  | gateway ids                                  | gateways              |
"""

PREFIX = "pdserve:v1"

GROUPS = f"{PREFIX}:groups"
GATEWAYS = f"{PREFIX}:gateways"

PERMANENT: frozenset[str] = frozenset()
"""Keys that may live without a time to live; tests fail on any other that does."""


def instance(instance_id: str) -> str:
    return f"{PREFIX}:instance:{instance_id}"


def gateway(gateway_id: str) -> str:
    return f"{PREFIX}:gateway:{gateway_id}"


def group(name: str) -> str:
    return f"{PREFIX}:group:{name}"
