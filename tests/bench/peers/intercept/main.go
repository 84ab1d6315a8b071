package main

import (
	"crypto/tls"
	"github.com/elazarl/goproxy"
	"net/http"
)

func main() {
	p := goproxy.NewProxyHttpServer()
	p.Tr.TLSClientConfig = &tls.Config{InsecureSkipVerify: true}
	p.Tr.MaxIdleConnsPerHost = 256
	p.OnRequest().HandleConnect(goproxy.AlwaysMitm)
	p.OnRequest().DoFunc(func(r *http.Request, c *goproxy.ProxyCtx) (*http.Request, *http.Response) {
		r.Header.Set("Authorization", "Bearer abcdefghijklmnopqrstuvwxyz0123456789")
		return r, nil
	})
	http.ListenAndServe("127.0.0.1:9071", p)
}
