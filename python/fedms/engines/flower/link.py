"""The server's end of Flower, inside the process that runs the rounds.

`flower-superlink` serves three interfaces on one port: one for nodes, one that takes runs and their code from whoever can
reach it, and one for the processes of such runs. Here is the one for nodes alone (Flower calls it the Fleet API), over TLS
and only for nodes whose keys are registered. So nobody can send code to the clients by way of the server, not even who
reaches its port. It is put together from Flower 1.41's own link state, routes and authentication of nodes.
"""
from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fedms.engines.flower  # noqa: F401  first: it sets Flower's environment
from fedms.errors import FedMSError

import uvicorn
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from fastapi import FastAPI
from flwr.app import Message as Mail
from flwr.app.error import Error
from flwr.app.message.message import remove_content_from_message
from flwr.common.constant import NOOP_FLWR_AID, SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.error import http_error_translator
from flwr.supercore.inflatable.inflatable_object import (get_all_nested_objects, get_object_tree, iterate_object_tree,
                                                         no_object_id_recompute)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware

RUN = 1                     # the number of the one run that Flower knows of
SMALL = 2**16               # bytes of a request that is always read: greetings, looks for messages
SLACK = 2**20               # bytes that answers may have beyond twice the largest message


class LinkError(FedMSError):
    """The server's port cannot be opened, or its certificate cannot be used."""

    title = "deployment"


class SuperLink:
    """Registered nodes, messages to them and replies from them; what the engine calls a grid."""

    def __init__(self) -> None:
        self._factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
        self._state: Any = self._factory.state()
        run = Run.create_empty(run_id=RUN)
        run.primary_task_id, run.federation_id = RUN, NOOP_FEDERATION_ID
        self._state.run_ids[RUN] = RunRecord(run=run)
        self._state.task_store[RUN] = Task(task_id=RUN, run_id=RUN)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = RUN, RUN, SUPERLINK_NODE_ID
        self._arriving: list[Any] = []                  # replies whose buffers are still under way
        self._largest: dict[int, int] = {}              # bytes of the largest message to a node
        self._taken: dict[int, int] = {}                # bytes that a node has sent since its last message
        for name in ("flwr", "uvicorn.error"):      # a line for each knock of a stranger, else
            logging.getLogger(name).setLevel(logging.CRITICAL)

    # Who may join

    def register(self, public_key: str, name: str) -> None:
        """Let a node connect.

        Args:
            public_key: Its public key in OpenSSH's format, on the elliptic curve P-384.

        Raises:
            ValueError: If the key is not valid, or is registered already.
        """
        self._state.create_node(NOOP_FLWR_AID, "", pem_of(public_key), 0.0, name=name)

    def unregister(self, name: str) -> None:
        """No longer let the nodes with this name connect. Their keys cannot be registered again while this object exists."""
        for node in list(self._state.nodes.values()):
            if node.name == name and not node.unregistered_at:
                node.online_until = node.online_until or 0.0        # Flower takes it for a number
                self._state.delete_node(NOOP_FLWR_AID, node.node_id)

    # What the engine asks for

    def get_nodes(self) -> Sequence[Any]:
        """Return the nodes that are connected, each with `node_id` and `name`."""
        return list(self._state.get_node_info(node_ids=list(self._state.get_nodes(RUN))))

    def push_messages(self, messages: Iterable[Mail]) -> list[str]:
        """Store messages until their nodes fetch them, and return the ids of those that were accepted."""
        taken = []
        with no_object_id_recompute():
            for message in messages:
                message.metadata.__dict__["_message_id"] = message.object_id
                objects = {number: each.deflate() for number, each in get_all_nested_objects(message).items()}
                session = self._state.start_session(RUN)        # over as soon as all that it misses is there
                stored, missing = self._state.store_message_and_object_tree(
                    remove_content_from_message(message), get_object_tree(message), session)
                if stored:
                    node, size = message.metadata.dst_node_id, sum(map(len, objects.values()))
                    self._largest[node], self._taken[node] = max(self._largest.get(node, 0), size), 0
                    for number in missing:
                        self._state.store_object(RUN, session, number, objects[number])
                    taken.append(message.metadata.message_id)
        return taken

    def pull_messages(self, numbers: Iterable[str]) -> list[Mail]:
        """Return the replies to messages with these ids that have arrived completely. Each is returned once."""
        under_way = {reply.metadata.reply_to_message_id for reply in self._arriving}
        found = self._state.get_message_res(message_ids=set(numbers) - under_way, run_id=RUN)
        self._state.delete_messages(message_ins_ids={reply.metadata.reply_to_message_id for reply in found})
        whole: list[Mail] = [reply for reply in found if reply.has_error()]
        self._arriving += [reply for reply in found if not reply.has_error()]
        for reply in list(self._arriving):
            try:
                if (message := self._inflated(reply)) is None:
                    continue
            except BaseException:
                self._arriving.remove(reply)        # what cannot be read is not read again
                raise
            self._arriving.remove(reply)
            whole.append(message)
        return whole

    def _inflated(self, reply: Mail) -> Mail | None:
        """Return the reply with its content, None while buffers are under way, or an error if they never arrived."""
        number, contents = reply.metadata.message_id, {}
        for tree in iterate_object_tree(self._state.object_store.get_object_tree(number)):
            content = self._state.get_object(RUN, tree.object_id)
            if content == b"":
                return None
            if content is None:
                failed = Mail(Error(ErrorCode.MESSAGE_UNAVAILABLE, "its upload broke off"), reply_to=reply)
                failed.metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
                return failed
            contents[tree.object_id] = content
        message = inflate_object_from_contents(number, contents)
        message.metadata.__dict__["_message_id"] = number
        self._state.object_store.delete(number)
        return message

    # The port

    @contextmanager
    def serve(self, host: str, port: int, certificates: Path) -> Iterator[int]:
        """Serve nodes by TLS in another thread, and yield the port. With port 0 the system chooses it.

        Args:
            certificates: Folder with server.pem and server.key.

        Raises:
            LinkError: If the port cannot be opened, or the certificate cannot be used.
        """
        app = FastAPI(openapi_url=None, middleware=[
            Middleware(_BoundedBodies, link=self), Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
            Middleware(ProtobufTranslationMiddleware), Middleware(NodeAuthMiddleware)])
        app.state.linkstate_factory, app.state.enable_supernode_auth = self._factory, True
        app.include_router(router)
        try:
            listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
            settings = uvicorn.Config(app, ssl_certfile=str(certificates / "server.pem"), log_config=None, access_log=False,
                                      ssl_keyfile=str(certificates / "server.key"), timeout_graceful_shutdown=2)
            settings.load()
        except OSError as error:
            raise LinkError(f"{host}:{port}: nodes cannot be served here: {error.strerror or error}; is another server "
                            "running, or the address another machine's?") from None
        server = uvicorn.Server(settings)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), name="superlink", daemon=True)
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise LinkError(f"{host}:{port}: the server did not start")
                time.sleep(0.02)
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(5)
            listening.close()

    # Bounds, before anything is read

    def node_of_key(self, key: bytes) -> int | None:
        return self._state.get_node_id_by_public_key(key)

    def allowance(self, node: int | None) -> int:
        """Most bytes of the next request of a node; what answers its messages may be larger than anything else."""
        if node is None:
            return SMALL
        return max(SMALL, 2 * self._largest.get(node, 0) + SLACK - self._taken.get(node, 0))

    def note_taken(self, node: int | None, size: int) -> None:
        if node is not None and size > SMALL:
            self._taken[node] = self._taken.get(node, 0) + size


class _BoundedBodies:
    """Refuses a request whose body is larger than its sender may send now, before a byte of it is read (status 413)."""

    def __init__(self, app: Any, link: SuperLink) -> None:
        self.app, self.link = app, link

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value for name, value in scope["headers"]}
        try:
            size = int(headers.get("content-length", b"x"))
            key = base64.b64decode(headers.get(FLEET_HTTP_PUBLIC_KEY_HEADER.lower(), b""), validate=True)
        except (ValueError, binascii.Error):
            size, key = -1, b""
        node = self.link.node_of_key(key)
        if not 0 <= size <= self.link.allowance(node):
            status = 411 if size < 0 else 413
            await send({"type": "http.response.start", "status": status, "headers": [(b"connection", b"close")]})
            await send({"type": "http.response.body", "body": b"more bytes than this node may send now" if size >= 0 else
                        b"a request without its length"})
            return

        async def noted(event: Any) -> None:
            # Only what the owner of the key sent counts: others are answered by 401.
            if event["type"] == "http.response.start" and event["status"] == 200:
                self.link.note_taken(node, size)
            await send(event)

        await self.app(scope, receive, noted)


def pem_of(public_key: str) -> bytes:
    """Return a public key in OpenSSH's format as PEM.

    Raises:
        ValueError: If it is not an elliptic-curve key on P-384.
    """
    try:
        key: Any = load_ssh_public_key(public_key.encode())
        if key.curve.name != "secp384r1":
            raise ValueError(key.curve.name)
    except (ValueError, AttributeError, UnicodeError, TypeError) as error:
        raise ValueError(f"no public key on the curve P-384 (ecdsa-sha2-nistp384 ...): {error}") from None
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
