import socket

from devstack.ports import free_port, is_free


def test_a_port_is_given_once_and_nobody_listens_on_it() -> None:
    given = [free_port() for _ in range(50)]

    assert len(set(given)) == 50
    assert all(is_free(port, host="127.0.0.1") for port in given)


def test_a_port_with_a_listener_on_one_address_is_not_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert not is_free(listener.getsockname()[1])


def test_a_port_with_a_listener_on_another_address_is_free_on_the_one_that_is_named() -> None:
    with socket.create_server(("127.0.0.2", 0)) as listener:
        port = listener.getsockname()[1]
        assert is_free(port, host="127.0.0.1")
        assert not is_free(port, host="127.0.0.2")


def test_a_port_with_an_ipv6_listener_is_not_free_there() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        assert not is_free(listener.getsockname()[1], host="::1")


def test_a_port_whose_connections_are_winding_down_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            served, _ = listener.accept()
            served.close()  # the side that closes first keeps the address for a while

    assert is_free(port)
