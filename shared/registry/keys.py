"""Every Redis key. All but maps and the leader's last term live by a time to live, which heartbeats renew.

| key                            | type | holds                                        | written by             |
|--------------------------------|------|----------------------------------------------|------------------------|
| pdserve:v1:instance:<id>       | str  | InstanceRecord as JSON                       | the instance           |
| pdserve:v1:gateway:<id>        | str  | GatewayRecord as JSON                        | the gateway            |
| pdserve:v1:instances           | set  | instance ids                                 | instances              |
| pdserve:v1:gateways            | set  | gateway ids                                  | gateways               |
| pdserve:v1:maps                | hash | group name -> GroupMap as JSON; permanent    | the leading controller |
| pdserve:v1:leader              | str  | the leading controller's id and term         | controllers            |
| pdserve:v1:term                | str  | the highest term there has been; permanent   | controllers            |
"""

PREFIX = "pdserve:v1"

INSTANCES = f"{PREFIX}:instances"
GATEWAYS = f"{PREFIX}:gateways"
MAPS = f"{PREFIX}:maps"
LEADER = f"{PREFIX}:leader"
TERM = f"{PREFIX}:term"

PERMANENT: frozenset[str] = frozenset({MAPS, TERM})
"""Keys that may live without a time to live; tests fail on any other that does."""


def instance(instance_id: str) -> str:
    return f"{PREFIX}:instance:{instance_id}"


def gateway(gateway_id: str) -> str:
    return f"{PREFIX}:gateway:{gateway_id}"
