"""Which gateway has the answer to a request with an Idempotency-Key, over all gateways."""

from shared.registry import keys
from shared.registry.registry import Registry

# The first gateway that claims a key keeps it as long as its own record lives. One with this gateway's own address was
# killed and restarted as this one; its record may live for a while yet.
_CLAIM = """
local value = redis.call('GET', KEYS[1])
if value then
    local id, address = string.match(value, '^(.-)|(.*)$')
    local is_other = id ~= ARGV[1] and address ~= ARGV[2] and address ~= ARGV[4]
    if is_other and redis.call('EXISTS', ARGV[5] .. id) == 1 then return address end
end
redis.call('SET', KEYS[1], ARGV[1] .. '|' .. ARGV[2], 'PX', ARGV[3])
return false
"""
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


class RedisIdempotencyIndex:
    """One gateway's claims in Redis.

    Args:
        gateway_id: of the gateway that claims keys.
        address: its HTTP address, at which other gateways fetch answers.
        ttl_s: how long a claim lasts: at least as long as a request and its kept answer.
    """

    def __init__(self, registry: Registry, gateway_id: str, address: str, ttl_s: float) -> None:
        self._registry = registry
        self._gateway_id = gateway_id
        self._address = address
        self._ttl_ms = int(ttl_s * 1000)

    async def claim(self, key_hash: str, *, instead_of: str | None = None) -> str | None:
        """Claims a key for this gateway, unless another live one has it, whose address is returned.

        Args:
            key_hash: of the key and of the API key to which it belongs.
            instead_of: address of a gateway that could not be reached: the key is claimed if that one has it.

        Raises:
            RegistryUnavailable: Redis cannot be reached.
        """
        arguments = (self._gateway_id, self._address, self._ttl_ms, instead_of or "", keys.gateway(""))
        [address] = await self._registry.run(
            lambda pipe: pipe.eval(_CLAIM, 1, keys.idempotent_answer(key_hash), *arguments)
        )
        return str(address) if address else None

    async def release(self, key_hash: str) -> None:
        """Releases a key, if this gateway has it.

        Raises:
            RegistryUnavailable: Redis cannot be reached.
        """
        own = f"{self._gateway_id}|{self._address}"
        await self._registry.run(lambda pipe: pipe.eval(_RELEASE, 1, keys.idempotent_answer(key_hash), own))
