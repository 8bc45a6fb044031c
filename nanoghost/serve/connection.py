"""uvicorn's HTTP/1.1 protocol with timeouts for clients that send or read too slowly, and a limit on connections."""

import asyncio
import socket
import struct

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_TIMEOUT = 10.0  # seconds from the first byte, or from connecting, to the end of a request's headers
STALL_TIMEOUT = 20.0  # seconds in which a client may read nothing while there is data for it
MAX_CONNECTIONS = 256
SEND_BUFFER = 65_536  # bytes that the operating system buffers for a client; we buffer a quarter of that
AT_CAPACITY = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 2\r\ncontent-length: 0\r\n\r\n"


class TimeoutProtocol(H11Protocol):
    """One connection: limits the time until the headers are complete and the time in which the client reads nothing."""

    header_timeout = HEADER_TIMEOUT
    stall_timeout = STALL_TIMEOUT
    max_connections = MAX_CONNECTIONS
    header_timer: asyncio.TimerHandle | None = None
    stall_timer: asyncio.TimerHandle | None = None
    close_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        transport.set_write_buffer_limits(high=SEND_BUFFER // 4)
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.write(AT_CAPACITY)
            transport.close()
        self.start_header_timer()  # for a rejected client, too: it may never read the response

    def data_received(self, data: bytes) -> None:
        if not self.is_responding and not self.header_timer:
            self.start_header_timer()
        super().data_received(data)
        if self.is_responding:
            self.stop_header_timer()

    @property
    def is_responding(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():  # it closes once everything is sent, but the client may never read it
            self.close_timer = self.loop.call_later(self.stall_timeout, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stall_timer = self.loop.call_later(self.stall_timeout, self.reset_connection)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.stop_stall_timer()

    def reset_connection(self) -> None:
        """Close at once and drop the data that the operating system still holds for the client."""
        no_linger = struct.pack("ii", 1, 0)
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
        self.transport.abort()

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()  # uvicorn would wait until the client has read everything

    def connection_lost(self, exc) -> None:
        self.stop_header_timer()
        self.stop_stall_timer()
        if self.close_timer:  # a transport that is closed already cannot be aborted
            self.close_timer.cancel()
        super().connection_lost(exc)

    def start_header_timer(self) -> None:
        self.header_timer = self.loop.call_later(self.header_timeout, self.transport.abort)

    def stop_header_timer(self) -> None:
        if self.header_timer:
            self.header_timer.cancel()
            self.header_timer = None

    def stop_stall_timer(self) -> None:
        if self.stall_timer:
            self.stall_timer.cancel()
            self.stall_timer = None
