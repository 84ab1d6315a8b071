"""One file a kind of issuer: `token_exchange` (RFC 8693), `static`; `http` is their one way to the network."""
