"""A client of pdserve with nothing but a NATS connection.

    .venv/bin/python examples/nats_client.py nats://127.0.0.1:4222 "What does os.path.join do?"

`pdserve up` prints its NATS address at start: this one, unless something else has the port.
"""

import asyncio
import json
import sys

import nats


async def main(url: str, question: str) -> None:
    connection = await nats.connect(url, allow_reconnect=False)
    inbox = connection.new_inbox()
    answers = await connection.subscribe(inbox)
    request = {"messages": [{"role": "user", "content": question}], "max_tokens": 200}
    await connection.publish("pdserve.v1.generate", json.dumps(request).encode(), reply=inbox)
    while True:
        message = await answers.next_msg(timeout=120)
        if (message.headers or {}).get("Status") == "503":
            sys.exit("no gateway is listening")
        answer = json.loads(message.data)
        if answer["type"] == "chunk":
            print(answer["text"], end="", flush=True)
        elif answer["type"] == "done":
            print(f"\n[{answer['finish_reason']}, {answer['usage']['completion_tokens']} tokens]")
            break
        else:
            sys.exit(f"\n{answer['error']['code']}: {answer['error']['message']}")
    await connection.close()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    asyncio.run(main(*sys.argv[1:]))
