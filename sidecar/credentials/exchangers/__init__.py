"""One file a kind of issuer: `token_exchange` (RFC 8693), `static` (a legacy shared secret). `registry` knows every kind;
`http` is their one way to the network."""
