"""On the PYTHONPATH of a SuperNode this changes what its ClientApp does, as who has that machine could.

MISBEHAVIOR (JSON): by client, what it does with the messages of a round, such as {"3": {"stage1 1": "remember",
"stage1 3": "replay"}}; other things are "nan" and "hang".
"""
import json
import os
import sys
import time

if any(word.endswith("flwr-clientapp") for word in sys.orig_argv):
    from fedms.engines.flower import client, transport
    from flwr.app import Message

    plan, honest = json.loads(os.environ["MISBEHAVIOR"]), client.train

    def train(message, identity, open_experiment):
        what = plan.get(str(identity.client), {}).get(message.metadata.group_id)
        old = identity.state / "old.json"
        if what == "hang":
            time.sleep(10**6)
        if what == "replay":
            head, parts = json.loads(old.read_text())
            parts = {name: bytes.fromhex(data) for name, data in parts.items()}
            return Message(transport.write(head, transport.buffers(parts)), reply_to=message)
        answer = honest(message, identity, open_experiment)
        head, parts = transport.read(answer.content)
        if what == "remember":
            old.write_text(json.dumps([head, {name: data.hex() for name, data in parts.items()}]))
        if what == "nan":
            from fedms.federated import encoding

            tensors = encoding.unpack(parts["tensors"])
            next(iter(tensors.values())).fill_(float("nan"))
            parts["tensors"] = encoding.pack(tensors)
            return Message(transport.write(head, transport.buffers(parts)), reply_to=message)
        return answer

    client.train = train
