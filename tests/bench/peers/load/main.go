package main

import (
	"crypto/tls"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sort"
	"sync"
	"time"
)

func main() {
	px := flag.String("x", "", "proxy")
	u := flag.String("u", "https://localhost:9443/", "url")
	c := flag.Int("c", 32, "")
	d := flag.Duration("d", 4*time.Second, "")
	flag.Parse()
	tr := &http.Transport{MaxIdleConnsPerHost: *c, MaxConnsPerHost: *c, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableCompression: true}
	if *px != "" {
		p, _ := url.Parse(*px)
		tr.Proxy = http.ProxyURL(p)
	}
	cl := &http.Client{Transport: tr}
	var mu sync.Mutex
	var all []float64
	errs := 0
	var wg sync.WaitGroup
	end := time.Now().Add(*d)
	var bytes int64
	for i := 0; i < *c; i++ {
		wg.Add(1)
		go func() {
			defer wg.Done()
			var l []float64
			e := 0
			var b int64
			for time.Now().Before(end) {
				t := time.Now()
				r, err := cl.Get(*u)
				if err != nil {
					e++
					if e < 2 {
						fmt.Println(err)
					}
					time.Sleep(10 * time.Millisecond)
					continue
				}
				n, _ := io.Copy(io.Discard, r.Body)
				r.Body.Close()
				b += n
				if r.StatusCode != 200 {
					e++
				}
				l = append(l, float64(time.Since(t).Microseconds()))
			}
			mu.Lock()
			all = append(all, l...)
			errs += e
			bytes += b
			mu.Unlock()
		}()
	}
	wg.Wait()
	sort.Float64s(all)
	n := len(all)
	if n == 0 {
		fmt.Println("0 none")
		return
	}
	fmt.Printf("%d requests rps=%.0f p50=%.2fms p99=%.2fms errs=%d MB/s=%.1f\n", n, float64(n)/d.Seconds(), all[n/2]/1000, all[n*99/100]/1000, errs, float64(bytes)/d.Seconds()/1e6)
}
