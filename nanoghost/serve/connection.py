"""A connection that loses its patience: uvicorn's, with limits on how slowly a client may send its headers and read its answer."""

import socket
import struct

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0  # from the first byte (or the connection) to the end of a request's headers
STALL_SECONDS = 20.0  # that a client may not read while there is something for it
MOST_CONNECTIONS = 256
SEND_BUFFER = 65_536  # bytes that the system holds for a client, and a quarter of it that we hold
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 2\r\ncontent-length: 0\r\n\r\n"


class PatientProtocol(H11Protocol):
    header_seconds, stall_seconds, most = HEADER_SECONDS, STALL_SECONDS, MOST_CONNECTIONS
    waiting = stalled = None

    def connection_made(self, transport) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        transport.set_write_buffer_limits(high=SEND_BUFFER // 4)
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.write(BUSY)
            transport.close()
        self.waiting = self.loop.call_later(self.header_seconds, transport.abort)

    def data_received(self, data: bytes) -> None:
        if not self.answering and not self.waiting:
            self.waiting = self.loop.call_later(self.header_seconds, self.transport.abort)
        super().data_received(data)
        if self.answering:
            self._cancel("waiting")

    @property
    def answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():  # but not before all is written, which the client may never read
            self.loop.call_later(self.stall_seconds, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stalled = self.loop.call_later(self.stall_seconds, self._throw_out)

    def _throw_out(self) -> None:
        """Without waiting for what the system still holds for them to be read, which it never is."""
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel("stalled")

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()

    def connection_lost(self, exc) -> None:
        self._cancel("waiting")
        self._cancel("stalled")
        super().connection_lost(exc)

    def _cancel(self, name: str) -> None:
        if timer := getattr(self, name):
            timer.cancel()
            setattr(self, name, None)
