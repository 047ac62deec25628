"""A client of pdserve with nothing but a NATS connection.

    .venv/bin/python examples/nats_client.py "$(cat .pdserve/nats/client.url)" "What does os.path.join do?"

`pdserve up` writes that file: a URL with user and password. A user may subscribe only to inboxes that begin with
`_INBOX.<user>.`; a server without accounts needs neither user nor prefix.
"""

import asyncio
import json
import sys
from urllib.parse import urlsplit

import nats


async def main(url: str, question: str) -> None:
    user = urlsplit(url).username
    connection = await nats.connect(url, inbox_prefix=f"_INBOX.{user}" if user else "_INBOX", allow_reconnect=False)
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
