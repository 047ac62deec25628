"""Every Redis key. All but maps, their versions and the last term expire, unless heartbeats renew them.

| key                                  | type | contains                                    | written by             |
|--------------------------------------|------|---------------------------------------------|------------------------|
| pdserve:v1:instance:<id>             | str  | InstanceRecord as JSON                      | the instance           |
| pdserve:v1:heartbeat:<id>            | str  | Heartbeat as JSON, from the same record     | the instance           |
| pdserve:v1:gateway:<id>              | str  | GatewayRecord as JSON                       | the gateway            |
| pdserve:v1:gateway:<id>:open         | hash | request key -> OpenAnswer as JSON           | the gateway            |
| pdserve:v1:gateway:<id>:claimed      | set  | request keys whose OpenAnswers were claimed | other gateways         |
| pdserve:v1:idempotency:<hash>        | str  | id and address of the gateway that has it   | gateways               |
| pdserve:v1:instances                 | set  | instance ids                                | instances              |
| pdserve:v1:gateways                  | set  | gateway ids                                 | gateways               |
| pdserve:v1:gateways_with_open        | set  | ids of gateways that have open answers      | gateways               |
| pdserve:v1:maps                      | hash | group name -> GroupMap as JSON; permanent   | the leading controller |
| pdserve:v1:map_versions              | hash | group name -> map version; permanent        | the leading controller |
| pdserve:v1:leader                    | str  | the leading controller's id and term        | controllers            |
| pdserve:v1:term                      | str  | the highest term so far; permanent          | controllers            |
"""

PREFIX = "pdserve:v1"

INSTANCES = f"{PREFIX}:instances"
GATEWAYS = f"{PREFIX}:gateways"
GATEWAYS_WITH_OPEN = f"{PREFIX}:gateways_with_open"
MAPS = f"{PREFIX}:maps"
MAP_VERSIONS = f"{PREFIX}:map_versions"
LEADER = f"{PREFIX}:leader"
TERM = f"{PREFIX}:term"

PERMANENT: frozenset[str] = frozenset({MAPS, MAP_VERSIONS, TERM})
"""Keys without a time to live; tests fail on any other that has none."""


def instance(instance_id: str) -> str:
    return f"{PREFIX}:instance:{instance_id}"


def heartbeat(instance_id: str) -> str:
    return f"{PREFIX}:heartbeat:{instance_id}"


def gateway(gateway_id: str) -> str:
    return f"{PREFIX}:gateway:{gateway_id}"


def open_answers(gateway_id: str) -> str:
    return f"{PREFIX}:gateway:{gateway_id}:open"


def claimed_answers(gateway_id: str) -> str:
    return f"{PREFIX}:gateway:{gateway_id}:claimed"


def idempotent_answer(key_hash: str) -> str:
    return f"{PREFIX}:idempotency:{key_hash}"
