"""The client's end of Flower: a connection to the server by which messages come and replies go.

`flower-supernode` takes an app from the server and runs its code in a process of its own for every message. Here no app is
ever fetched: messages are handed to the installed package, in a process that stays. Made of Flower 1.41's own client of its
Fleet API, so the same node authentication and wire format.
"""
from __future__ import annotations

import threading
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any

import fedms.engines.flower  # noqa: F401  first: it sets Flower's environment

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import Message as Mail
from flwr.app.message.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (get_all_nested_objects, get_object_tree, iterate_object_tree,
                                                         no_object_id_recompute)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf, make_pull_object_fn_protobuf, make_push_object_fn_protobuf)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedms.errors import FedMSError

HEARTBEAT = 10.0            # seconds; after two without one the server takes the node for away
CLOCKS = 10.0               # seconds by which clocks may differ before it is said


class Lost(FedMSError):
    """There is no connection now; the message says why. Trying again later may help."""

    title = "no connection to the server"


class Rejected(Lost):
    """The server does not know this connection or this client's key, or another node has connected with the key."""


class Connection:
    """A node's connection to the server, open inside `with`.

    Args:
        address: Address of the server, "host:port".
        authority: Certificate of the authority that signed the server's certificate, PEM.
        key: Private key of the client.

    Raises:
        Lost: On entering, if the server cannot be reached or trusted.
        Rejected: On entering, if the server does not accept this key.
    """

    def __init__(self, address: str, authority: bytes, key: EllipticCurvePrivateKey) -> None:
        self.address = address
        self._key = public_key_to_bytes(key.public_key())
        self._client = FleetHttpClient.from_server_address(address, False, authority, interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperNode"), NodeAuthHttpInterceptor(key, key.public_key())])
        self._node: Any = None
        self._ended = threading.Event()

    def __enter__(self) -> Connection:
        try:
            answer = self._call(self._client.ActivateNode,
                                ActivateNodeRequest(public_key=self._key, heartbeat_interval=HEARTBEAT))
        except BaseException:
            self._client.close()
            raise
        self._node = Node(node_id=answer.node_id)
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        try:
            self._call(self._client.DeactivateNode, DeactivateNodeRequest(node_id=self._node.node_id))
        except Lost:
            pass                    # the server notices by itself
        self._client.close()

    def receive(self) -> Mail | None:
        """Return the next message, or None if there is none.

        Raises:
            Lost: If the connection is lost.
        """
        found = self._call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        if not found.messages_list:
            return None
        head, tree = message_from_proto(found.messages_list[0]), found.message_object_trees[0]
        run, number = head.metadata.run_id, head.metadata.message_id
        pull = make_pull_object_fn_protobuf(lambda r: self._call(self._client.PullObject, r), self._node, run)
        contents = {each.object_id: pull(each.object_id) for each in iterate_object_tree(tree)}
        make_confirm_message_received_fn_protobuf(
            lambda r: self._call(self._client.ConfirmMessageReceived, r), self._node, run)(number)
        message = inflate_object_from_contents(number, contents)
        message.metadata.__dict__["_message_id"] = number
        return message

    def send(self, reply: Mail) -> None:
        """Send a reply.

        Raises:
            Lost: If the connection is lost.
        """
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            objects = get_all_nested_objects(reply)
            taken = self._call(self._client.PushMessages, PushMessagesRequest(
                node=self._node, messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)], clientapp_runtime_list=[0.0]))
            push = make_push_object_fn_protobuf(lambda r: self._call(self._client.PushObject, r), self._node,
                                                reply.metadata.run_id, taken.session_id)
            for number in taken.objects_to_push:
                push(number, objects[number].deflate())

    def _beat(self) -> None:
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT)
        while not self._ended.wait(HEARTBEAT * 0.7):
            try:
                self._call(self._client.SendNodeHeartbeat, request)
            except Lost:
                pass                # the next look for messages tells

    def _call(self, method: Callable[[Any], Any], request: Any) -> Any:
        try:
            return method(request)
        except httpx.HTTPStatusError as error:
            raise self._refusal(error.response) from None
        except httpx.HTTPError as error:
            raise Lost(self._unreachable(error)) from None

    def _refusal(self, response: httpx.Response) -> Lost:
        """Return what an answer of the server that is no success means. 401 and 412 are Flower's refusals of a node or its key."""
        status = response.status_code
        if status == 413:
            return Lost(f"{self.address}: the server takes no more bytes of this client for its last message")
        if status not in (401, 412):
            return Lost(f"{self.address}: the server cannot answer now (status {status}): it is ending, starting, or has failed")
        try:
            off = time.time() - parsedate_to_datetime(response.headers["date"]).timestamp()
        except (KeyError, TypeError, ValueError):
            off = 0.0
        if abs(off) > CLOCKS:
            return Rejected(f"{self.address}: this machine's clock is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} "
                            "the server's, so its signatures are not taken; set the clock")
        if self._node is not None:
            return Rejected(f"{self.address}: the server no longer knows this connection: it was started again, or its operator has "
                            "removed this client")
        return Rejected(f"{self.address}: the server does not take this client's key: it has not been accepted there (fedms "
                        "server accept), was removed, or another node with the same key is connected")

    def _unreachable(self, error: httpx.HTTPError) -> str:
        text = str(error)
        if "CERTIFICATE_VERIFY_FAILED" in text:
            why = text.partition("CERTIFICATE_VERIFY_FAILED]")[2].partition(" (_ssl")[0].strip(" :") or text
            return (f"{self.address}: the server's certificate is not trusted ({why}); ask its operator for a new invitation "
                    "if it was renewed, and look at this machine's clock")
        return f"{self.address}: the server cannot be reached: {text or type(error).__name__}"


def serve(connection: Connection, answer: Callable[[Mail], Mail | None], stop: Callable[[], bool], pause: float = 0.2) -> None:
    """Answer messages, one at a time, until told to stop.

    Args:
        answer: Returns the reply to a message, or None for no reply.

    Raises:
        Rejected: If the server does not know the node any more.
        Lost: If the server has been away for a minute.
    """
    silent_since: float | None = None
    while not stop():
        try:
            message = connection.receive()
            if message is not None and (reply := answer(message)) is not None:
                connection.send(reply)
            silent_since = None
        except Rejected:
            raise
        except Lost:
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > 60:
                raise
            time.sleep(5 * pause)
            continue
        if message is None:
            time.sleep(pause)
